"""Engines and machines: what can be loaded here, which engine is whose, and what is said of it."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes.backends.engines import backend, load
from runtimes.backends.engines.cuda import Cuda, CudaError, Gpu
from runtimes.backends.engines.machine import engine_mismatch
from runtimes.backends.engines.trust import trust_engine
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Engine
from runtimes.errors import UserError
from runtimes.session import SessionOptions
from tests.runtimes.backends.fake_cuda import NO_DRIVER, FakeCuda, FakeTensorRT, fake_plan
from tests.runtimes.backends.test_engine_session import CAPACITY, onnx_file
from tests.runtimes.backends.test_session_contract import embeds

RELEASE = version("onnxruntime")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def use(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    """A machine with this GPU and this TensorRT."""
    for module in (load, backend):
        monkeypatch.setattr(module, "import_cuda", lambda: cuda)
        monkeypatch.setattr(module, "import_library", lambda name: trt)


def test_loading_an_engine(
    trt11_bundle: Bundle, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, contract = onnx_file(trt11_bundle)
    file = tmp_path / "decoder.onnx"
    use(monkeypatch, cuda, FakeTensorRT(cuda, {"decoder": contract}))
    options = SessionOptions()
    with pytest.raises(
        UserError, match=r"The engine .*decoder\.engine does not exist; run: dsvl-export build-engine"
    ):
        backend.open_decoder("tensorrt", file, contract, options)
    plan = file.with_suffix(".engine")
    plan.write_bytes(fake_plan(source, "decoder", CAPACITY))
    decoder = backend.open_decoder("tensorrt", file, contract, options)
    assert decoder.decode(embeds(decoder, 1, 3), np.array([2]), decoder.new_cache(1, 8)).shape[:2] == (1, 1)
    plan.write_bytes(plan.read_bytes()[:-7])
    with pytest.raises(
        UserError,
        match=r"TensorRT cannot load .*: the plan's magic tag does not match; host code in it is not run",
    ):
        backend.open_decoder("tensorrt", file, contract, options)
    trust_engine(plan)
    with pytest.raises(
        UserError, match=r"TensorRT cannot load .*: the plan's magic tag does not match; build it again"
    ):
        backend.open_decoder("tensorrt", file, contract, options)
    plan.write_bytes(b"")
    with pytest.raises(UserError, match="is not readable: cannot mmap an empty file"):
        backend.open_decoder("tensorrt", file, contract, options)
    with pytest.raises(UserError, match="runs on cuda, or its ONNX files on cpu, not on mps"):
        backend.open_decoder("tensorrt", file, contract, SessionOptions(device="mps"))
    cuda.gpus = 0
    with pytest.raises(
        UserError,
        match=r"need an NVIDIA GPU \(CUDA failed in .*cudaErrorInsufficientDriver.*\); use --device cpu",
    ):
        backend.open_decoder("tensorrt", file, contract, options)


def test_code_of_an_engine_runs_where_it_was_built_or_is_trusted(
    trt11_bundle: Bundle, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, contract = onnx_file(trt11_bundle)
    use(monkeypatch, cuda, FakeTensorRT(cuda, {"decoder": contract}))
    plan = tmp_path / "decoder.engine"
    plan.write_bytes(fake_plan(source, "decoder", CAPACITY, host_code=True))

    def load() -> object:
        return backend.open_decoder("tensorrt", tmp_path / "decoder.onnx", contract, SessionOptions())

    with pytest.raises(UserError, match="host code, which is not allowed; host code in it is not run"):
        load()
    trust_engine(plan)
    assert load()
    plan.write_bytes(fake_plan(source, "decoder", CAPACITY + 1, host_code=True))  # another one in its place
    with pytest.raises(UserError, match="or use --trust-engine if you trust its author"):
        load()


ENGINE = Engine("f", (87,), "Orin", "CUDA 12.6", "10.3.0", 2048, 8, (), "aarch64")


@pytest.mark.parametrize(
    ("engine", "gpu", "version", "reason"),
    [
        (ENGINE, Gpu("Orin", 87, "", "aarch64"), "10.3.0", None),
        (ENGINE, Gpu("Orin", 87, "another driver", "aarch64"), "10.3.0", None),
        (ENGINE, Gpu("NVIDIA L4", 89, "", "aarch64"), "10.3.0", "its engine was built for SM 87, but this machine has NVIDIA L4 (SM 89)"),
        (ENGINE, Gpu("Orin Nano", 87, "", "aarch64"), "10.3.0", "its engine was built on Orin, but this machine has Orin Nano (SM 87)"),
        (ENGINE, Gpu("Orin", 87, "", "aarch64"), "10.4.0", "its engine was built by tensorrt 10.3.0, but 10.4.0 is installed"),
        (replace(ENGINE, options=("version-compatible",)), Gpu("Orin", 87, "", "aarch64"), "10.4.0", None),
        (replace(ENGINE, options=("version-compatible",)), Gpu("Orin", 87, "", "aarch64"), "11.0.0", "its engine was built by tensorrt 10.3.0, but 11.0.0 is installed"),
        (replace(ENGINE, options=("version-compatible",)), Gpu("Orin", 87, "", "aarch64"), "10.2.0", "its engine was built by tensorrt 10.3.0, but 10.2.0 is installed"),
        (replace(ENGINE, options=("hardware-compatible",)), Gpu("NVIDIA L4", 89, "", "aarch64"), "10.3.0", None),
        (replace(ENGINE, options=("hardware-compatible",)), Gpu("T4", 75, "", "aarch64"), "10.3.0", "its engine was built for SM 87, but this machine has T4 (SM 75)"),
        (replace(ENGINE, platform="x86_64"), Gpu("Orin", 87, "", "aarch64"), "10.3.0", "its engine was built on x86_64, but this machine is aarch64"),
        (replace(ENGINE, gpu="", sm=(86, 89)), Gpu("RTX 4090", 89, "", "aarch64"), "10.3.0", None),
        (replace(ENGINE, gpu="", sm=(86, 89)), Gpu("RTX 5090", 120, "", "aarch64"), "10.3.0", "its engine was built for SM 86, 89, but this machine has RTX 5090 (SM 120)"),
    ],
)  # fmt: skip
def test_engines_of_other_machines(engine: Engine, gpu: Gpu, version: str, reason: str | None) -> None:
    assert engine_mismatch(engine, gpu, "tensorrt", version) == reason


def test_what_the_gpu_is(cuda: FakeCuda) -> None:
    name = "Fake GPU with 16 multiprocessors"
    assert Cuda(cuda).gpu() == Gpu(name, 89, "CUDA 12.6", platform.machine())
    cuda.fail["cudaGetDeviceProperties"] = NO_DRIVER
    with pytest.raises(CudaError, match="cudaErrorInsufficientDriver"):
        Cuda(cuda).gpu()


def test_missing_libraries_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name)

    def broken(name: str) -> object:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("runtimes.backends.engines.library.import_module", missing)
    from runtimes.backends.engines.library import import_library

    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        with pytest.raises(
            UserError,
            match=rf"The backend {name} is not installed; run: pip install 'dsvl-export\[{extra}\]'",
        ):
            import_library(name)
    monkeypatch.setattr("runtimes.backends.engines.library.import_module", broken)
    with pytest.raises(UserError, match=r"tensorrt cannot be loaded here: libnvinfer\.so\.10: cannot open"):
        import_library("tensorrt")


def test_executions(trt11_bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The honest word about an artifact, by what the machine is."""
    artifact = trt11_bundle.artifact("decoder", "tensorrt", "fp32")
    engine = replace(ENGINE, sm=(89,), gpu="Fake GPU with 16 multiprocessors", tensorrt="11.4.0", platform="")
    built = replace(artifact, engine=engine)
    cuda.gpus = 0
    use(monkeypatch, cuda, FakeTensorRT(cuda, {}))
    assert (
        str(backend.execution("tensorrt", artifact))
        == f"simulated by ONNX Runtime {RELEASE} on the same file"
    )
    rtx = backend.execution("tensorrt_rtx", built)
    assert str(rtx) == f"built by TensorRT-RTX on CPU, numerics by ONNX Runtime {RELEASE} on the same file"
    assert (rtx.kind, rtx.device, rtx.runnable) == ("simulated", "cpu", True)
    asked = backend.execution("tensorrt", built, "cuda")
    assert (
        asked.kind == "not run"
        and "cudaErrorInsufficientDriver" in asked.by
        and "cuda-python==12.6.*" in asked.by
    )
    assert (
        str(backend.execution("tensorrt", built, "npu"))
        == "not run: tensorrt runs on cuda, or its ONNX files on cpu, not on npu"
    )
    monkeypatch.setattr(backend, "DRIVER_FILES", (Path("/"),))  # a driver is there, and of no use
    assert backend.execution("tensorrt", built).kind == "not run"
    monkeypatch.setattr(backend, "DRIVER_FILES", ())
    assert backend.devices("tensorrt") == ["cpu"]
    cuda.gpus = 1
    assert backend.devices("tensorrt") == ["cuda"]
    # What has no engine yet is judged as on a machine without a GPU, unless the GPU is asked for.
    assert (
        str(backend.execution("tensorrt", artifact))
        == f"simulated by ONNX Runtime {RELEASE} on the same file"
    )
    asked = backend.execution("tensorrt", artifact, "cuda")
    assert str(asked) == "not run: it has no engine yet; run: dsvl-export build-engine BUNDLE"
    ran = backend.execution("tensorrt", built)
    assert (str(ran), ran.device) == ("ran on Fake GPU with 16 multiprocessors with tensorrt 11.4.0", "cuda")
    other = replace(built, engine=replace(engine, sm=(87,)))
    state = backend.execution("tensorrt", other)
    assert state.kind == "not run" and state.by.endswith(
        "but this machine has Fake GPU with 16 multiprocessors (SM 89); run: dsvl-export build-engine BUNDLE"
    )
    bundle = SimpleNamespace(manifest=SimpleNamespace(artifacts=[built, other]))
    (problem,) = backend.engine_problems(bundle)  # type: ignore[arg-type]
    assert "its engine was built for SM 87" in problem
