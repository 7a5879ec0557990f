"""The backends ``tensorrt`` and ``tensorrt_rtx``: the library's name is an argument."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.backends import onnxruntime
from runtimes.backends.engines.cuda import Cuda, Gpu, import_cuda
from runtimes.backends.engines.library import import_library
from runtimes.backends.engines.machine import mismatch
from runtimes.backends.engines.session import GPU, EngineComponent, EngineDecoder, load_engine
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.manifest import Artifact

# What an NVIDIA driver makes, on a server and on a Jetson.
DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"))
BUILDERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX on CPU"}


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU that cuda-python can use, or why there is none."""
    try:
        return Cuda(import_cuda()).gpu(), ""
    except UserError as error:
        return None, str(error).rstrip(".")


def devices(library: str) -> list[str]:
    """``cuda`` where engines run, ``cpu`` where ONNX Runtime can run their ONNX files instead.

    Raises:
        UserError: neither; the sentence names the extra.
    """
    gpu, _ = find_gpu()
    if gpu:
        import_library(library)
        return [GPU]
    return onnxruntime.devices()


def execution(library: str, artifact: Artifact, device: str | None = None) -> Execution:
    if device == "cpu" or (device is None and artifact.engine is None):
        return _simulated(library, artifact)
    if device not in (None, GPU):
        return Execution("not run", f"{library} runs on {GPU}, or its ONNX files on cpu, not on {device}")
    gpu, reason = find_gpu()
    if gpu is None:
        # A GPU that is there but cannot be used is an error, not a machine without one.
        unusable = any(path.exists() for path in DRIVER_FILES)
        return Execution("not run", reason) if device or unusable else _simulated(library, artifact)
    try:
        version = import_library(library).__version__
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if artifact.engine is None:
        return Execution("not run", f"it has no engine yet; {rebuild(library)}")
    reason = mismatch(artifact.engine, gpu, library, version) or ""
    if reason:
        return Execution("not run", f"{reason}; {rebuild(library)}")
    return Execution("ran", f"{gpu.name} with {library} {version}", device=GPU)


def foreign_engines(bundle: Bundle) -> list[str]:
    """What is wrong with a bundle's engines here; nothing where there is no GPU to judge by."""
    found = []
    for artifact in bundle.manifest.artifacts:
        if artifact.engine and artifact.backend in BUILDERS:
            state = execution(artifact.backend, artifact)
            if state.kind == "not run":
                found.append(f"{artifact.engine.file} cannot run here: {state.by}")
    return found


def rebuild(library: str) -> str:
    """The command that makes an engine for this machine."""
    if library == "tensorrt":
        return "run: dsvl-export build-engine BUNDLE"
    return (
        "export it again for this GPU: dsvl-export export CHECKPOINT --backend tensorrt_rtx --output BUNDLE"
    )


def _simulated(library: str, artifact: Artifact) -> Execution:
    try:
        onnxruntime.devices()
    except UserError as error:
        return Execution("not run", f"without a GPU its ONNX would be run, but: {str(error).rstrip('.')}")
    built = BUILDERS[library] if artifact.engine else ""
    too_old = onnxruntime.too_old(artifact)
    if artifact.base == "bf16":
        why = "ONNX Runtime has no kernels for bfloat16 on a CPU that could stand for a GPU"
        return Execution("built only", f"{built}; {why}") if built else Execution("not run", why)
    if too_old:
        why = f"without a GPU {too_old}"
        return Execution("built only", f"{built}; {why}") if built else Execution("not run", why)
    by = f"ONNX Runtime {onnxruntime.release()} on the same file"
    return Execution("simulated", by, built_by=built)


def open_component(library: str, file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    if options.device == "cpu":
        return onnxruntime.open_component(file, contract, options)
    return EngineComponent(load_engine(library, file, options), contract)


def open_decoder(library: str, file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    if options.device == "cpu":
        return onnxruntime.open_decoder(file, contract, options)
    return EngineDecoder(load_engine(library, file, options), contract)
