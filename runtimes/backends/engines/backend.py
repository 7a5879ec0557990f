"""The backends ``tensorrt`` and ``tensorrt_rtx``, with the name of the library as argument."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.backends import onnxruntime
from runtimes.backends.engines.cuda import Cuda, Gpu, import_cuda
from runtimes.backends.engines.library import import_library
from runtimes.backends.engines.load import GPU, load_engine
from runtimes.backends.engines.machine import engine_mismatch
from runtimes.backends.engines.session import EngineComponent, EngineDecoder
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.manifest import Artifact

# Device files of an NVIDIA driver, on a server and on a Jetson.
DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"))
BUILDERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX on CPU"}


def find_gpu() -> tuple[Gpu | None, str]:
    """Return the GPU that cuda-python can use and an empty string, or None and the reason."""
    try:
        return Cuda(import_cuda()).gpu(), ""
    except UserError as error:
        return None, str(error).rstrip(".")


def devices(library: str) -> list[str]:
    """List ``cuda`` if engines run here, else ``cpu`` if ONNX Runtime can run their ONNX files.

    Raises:
        UserError: neither is installed; the message names the extra.
    """
    gpu, _ = find_gpu()
    if gpu:
        import_library(library)
        return [GPU]
    return onnxruntime.devices()


def execution(library: str, artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    if device == "cpu" or (device is None and artifact.engine is None):
        return _simulated(library, artifact)
    if device not in (None, GPU):
        return Execution("not run", f"{library} runs on {GPU}, or its ONNX files on cpu, not on {device}")
    gpu, reason = find_gpu()
    if gpu is None:
        # A GPU that exists but cannot be used is an error, not a machine without a GPU.
        unusable = any(path.exists() for path in DRIVER_FILES)
        return Execution("not run", reason) if device or unusable else _simulated(library, artifact)
    try:
        version = import_library(library).__version__
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if artifact.engine is None:
        return Execution("not run", f"it has no engine yet; {rebuild_command(library)}")
    reason = engine_mismatch(artifact.engine, gpu, library, version) or ""
    if reason:
        return Execution("not run", f"{reason}; {rebuild_command(library)}")
    return Execution("ran", f"{gpu.name} with {library} {version}", device=GPU)


def engine_problems(bundle: Bundle) -> list[str]:
    """List the engines of a bundle that cannot run on this GPU; empty without a GPU."""
    problems = []
    for artifact in bundle.manifest.artifacts:
        if artifact.engine and artifact.backend in BUILDERS:
            state = execution(artifact.backend, artifact)
            if state.kind == "not run":
                problems.append(f"{artifact.engine.file} cannot run here: {state.by}")
    return problems


def rebuild_command(library: str) -> str:
    """Return the command that builds an engine for this machine, as the end of a message."""
    if library == "tensorrt":
        return "run: dsvl-export build-engine BUNDLE"
    return (
        "export it again for this GPU: dsvl-export export CHECKPOINT --backend tensorrt_rtx --output BUNDLE"
    )


def _simulated(library: str, artifact: Artifact) -> Execution:
    try:
        onnxruntime.devices()
    except UserError as error:
        return Execution(
            "not run", f"without a GPU, ONNX Runtime runs its ONNX files, but: {str(error).rstrip('.')}"
        )
    built = BUILDERS[library] if artifact.engine else ""
    release_problem = onnxruntime.release_problem(artifact)
    if artifact.base == "bf16":
        why = "ONNX Runtime has no bfloat16 kernels on a CPU that could simulate a GPU"
        return Execution("built only", f"{built}; {why}") if built else Execution("not run", why)
    if release_problem:
        why = f"without a GPU {release_problem}"
        return Execution("built only", f"{built}; {why}") if built else Execution("not run", why)
    by = f"ONNX Runtime {onnxruntime.release()} on the same file"
    return Execution("simulated", by, built_by=built)


def open_component(library: str, file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component on the GPU, or its ONNX file on ``cpu``."""
    if options.device == "cpu":
        return onnxruntime.open_component(file, contract, options)
    return EngineComponent(load_engine(library, file, options), contract)


def open_decoder(library: str, file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder on the GPU, or its ONNX file on ``cpu``."""
    if options.device == "cpu":
        return onnxruntime.open_decoder(file, contract, options)
    return EngineDecoder(load_engine(library, file, options), contract)
