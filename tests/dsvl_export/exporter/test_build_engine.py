"""Building engines: what the builder is told, building on a device, and the whole way on a fake GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest

from dsvl_export.compilers.engines.build import EngineSettings, build_engine, configure, profiles
from dsvl_export.compilers.engines.network import ParsedNetwork, attention_of
from dsvl_export.exporter import build_engines as engines_module
from dsvl_export.exporter.build_engines import Device, build_engines
from dsvl_export.exporter.export import export
from dsvl_export.exporter.staging import Staging
from dsvl_export.parity_check import parity
from runtimes.backends.engines import backend, load
from runtimes.backends.engines.cuda import Gpu
from runtimes.backends.engines.library import get_logger
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from tests.runtimes.backends.fake_cuda import FakeCuda, FakeTensorRT, fake_plan


def test_the_decoders_cache_is_static_in_the_engine_and_lengths_are_told(
    trt: ModuleType, rtx: Bundle
) -> None:
    file = rtx.path(rtx.artifact("decoder", "tensorrt_rtx", "fp16").files[0])
    parsed = ParsedNetwork(trt, file, rtx.manifest.contracts["fp16"]["decoder"], 384)
    assert tuple(parsed.input("key_cache_0").shape)[2] == 384
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    heads = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    states = rtx.manifest.contracts["fp16"]["decoder"].states
    assert len(updates) == len(states) == 2 * len(heads)
    for layer in heads:
        attention = attention_of(
            trt, layer
        )  # fails if the bindings no longer allow a layer to change its class
        assert attention.key_value_lengths is not None and attention.mask is not None


def test_profiles() -> None:
    settings = EngineSettings(1024, max_batch=4)
    assert profiles(Contract("adaptor", (), ()), settings) == [{"batch": (1, 1, 1)}]
    state = SimpleNamespace()
    prefill, decode = profiles(Contract("decoder", (), (), (state,)), settings)  # type: ignore[arg-type]
    assert prefill == {
        "batch": (1, 1, 1),
        "sequence": (1, 512, 512),
        "rows": (1, 1, 64),
        "capacity": (1, 1024, 1024),
    }
    assert decode == {
        "batch": (1, 1, 4),
        "sequence": (1, 1, 1),
        "rows": (1, 1, 1),
        "capacity": (1, 1024, 1024),
    }
    short, _ = profiles(Contract("decoder", (), (), (state,)), EngineSettings(40))  # type: ignore[arg-type]
    assert (short["sequence"], short["rows"]) == ((1, 40, 40), (1, 1, 40))


class Recorder:
    """A builder's config and an enumeration of anything, which remember."""

    calls: list[tuple[str, object]]

    def __init__(self) -> None:
        self.__dict__["calls"] = []

    def __getattr__(self, name: str) -> object:
        if name[0].isupper():
            return f"{name}"
        return lambda *arguments: self.calls.append((name, arguments)) or b"times"

    def __setattr__(self, name: str, value: object) -> None:
        self.calls.append((name, value))


class Names:
    """Stands for TensorRT's enumerations: every member is its own name."""

    def __getattr__(self, name: str) -> object:
        return Names() if name[0].isupper() and not name.isupper() else name


def test_what_the_builder_is_told(tmp_path: Path) -> None:
    config = Recorder()
    cache = tmp_path / "times"
    cache.write_bytes(b"old")
    settings = EngineSettings(
        64, workspace_bytes=5, timing_cache=cache, version_compatible=True, hardware_compatible=True,
        weight_streaming=True, dla_core=1,
    )  # fmt: skip
    configure(Names(), config, settings)  # type: ignore[arg-type]
    assert config.calls == [
        ("set_memory_pool_limit", ("WORKSPACE", 5)),
        ("set_flag", ("VERSION_COMPATIBLE",)),
        ("hardware_compatibility_level", "AMPERE_PLUS"),
        ("set_flag", ("WEIGHT_STREAMING",)),
        ("default_device_type", "DLA"),
        ("DLA_core", 1),
        ("set_flag", ("GPU_FALLBACK",)),
        ("create_timing_cache", (b"old",)),
        ("set_timing_cache", (b"times", False)),
    ]
    assert settings.options == (
        "version-compatible",
        "hardware-compatible",
        "weight-streaming",
        "dla-1",
        "workspace-5",
    )


def test_every_setting_is_one_of_the_real_library(trt: ModuleType) -> None:
    config = trt.Builder(get_logger(trt)).create_builder_config()
    for name in (
        "set_memory_pool_limit",
        "set_flag",
        "DLA_core",
        "default_device_type",
        "create_timing_cache",
        "set_timing_cache",
        "hardware_compatibility_level",
    ):
        assert hasattr(config, name), name
    for member in ("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "GPU_FALLBACK"):
        assert hasattr(trt.BuilderFlag, member), member
    assert hasattr(trt.HardwareCompatibilityLevel, "AMPERE_PLUS") and hasattr(trt.DeviceType, "DLA")


def test_an_unknown_capability(trt: ModuleType, rtx: Bundle, tmp_path: Path) -> None:
    file = rtx.path(rtx.artifact("adaptor", "tensorrt_rtx", "fp16").files[0])
    contract = rtx.manifest.contracts["fp16"]["adaptor"]
    with pytest.raises(UserError, match=r"builds no engines for SM 87; it supports 75, 80, 86, 89, 120"):
        build_engine(trt, file, contract, EngineSettings(64, compute_capabilities=(87,)), tmp_path / "e")


def test_a_damaged_file_is_a_sentence(trt: ModuleType, rtx: Bundle, tmp_path: Path) -> None:
    model = onnx.load(str(rtx.path(rtx.artifact("adaptor", "tensorrt_rtx", "fp16").files[0])))
    model.graph.node[0].op_type = "Det"
    onnx.save(model, str(tmp_path / "adaptor.onnx"))
    contract = rtx.manifest.contracts["fp16"]["adaptor"]
    with pytest.raises(UserError, match=r"TensorRT cannot import .*adaptor\.onnx"):
        build_engine(trt, tmp_path / "adaptor.onnx", contract, EngineSettings(64), tmp_path / "e")


# Building on a device. TensorRT-RTX plays TensorRT, for SM 89, and builds for real.
L4 = Gpu("NVIDIA L4 with 58 multiprocessors", 89, "CUDA 13.0", "x86_64")
SETTINGS = EngineSettings(128, compute_capabilities=(89,))


@pytest.fixture
def device(trt: ModuleType) -> Device:
    """A machine with an L4 and a TensorRT 11.4 whose builder is TensorRT-RTX's."""
    library = ModuleType("tensorrt_rtx")
    library.__dict__.update(vars(trt))
    library.__version__ = "11.4.1"  # type: ignore[attr-defined]
    return Device(library, L4)


@pytest.fixture
def copy_of_trt11(trt11_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trt11_bundle.folder, tmp_path / "bundle"))


def test_build_engine_puts_engines_into_the_bundle(copy_of_trt11: Path, device: Device) -> None:
    steps: list[str] = []
    built = build_engines(
        copy_of_trt11, SETTINGS, "fp16", device, lambda name, done, total: steps.append(name)
    )
    assert steps == ["fp16/vision_encoder", "fp16/adaptor", "fp16/decoder", "done"]
    bundle = Bundle.open(copy_of_trt11)
    assert bundle.problems() == []
    for item in built:
        again = bundle.artifact(item.component, "tensorrt", "fp16")
        assert again == item
        assert again.engine and (again.engine.gpu, again.engine.sm, again.engine.tensorrt) == (
            L4.name,
            (89,),
            "11.4.1",
        )
        assert (again.engine.driver, again.engine.capacity) == ("CUDA 13.0", 128)
    assert bundle.artifact("decoder", "tensorrt", "fp32").engine is None
    times = {item.files[-1]: bundle.path(item.files[-1]).stat().st_mtime_ns for item in built}
    build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    assert {path: bundle.path(path).stat().st_mtime_ns for path in times} == times  # kept
    build_engines(copy_of_trt11, EngineSettings(64, compute_capabilities=(89,)), "fp16", device)
    assert Bundle.open(copy_of_trt11).problems() == []
    assert {path: bundle.path(path).stat().st_mtime_ns for path in times} != times


def test_a_later_export_keeps_the_engines(copy_of_trt11: Path, device: Device) -> None:
    build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    bundle = export(
        "tiny", copy_of_trt11, "tensorrt", ["int8-weights"], goldens=False, tensorrt="11.4", capacity=256
    )
    assert bundle.artifact("decoder", "tensorrt", "fp16").engine
    assert bundle.problems() == []


def test_an_interrupted_build_goes_on(
    copy_of_trt11: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, calls = build_engine, []

    def interrupted(trt: ModuleType, file: Path, *rest: object) -> None:
        calls.append(file.stem)
        if len(calls) == 2:
            raise KeyboardInterrupt
        build(trt, file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engines_module, "build_engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    assert Bundle.open(copy_of_trt11).problems() == []
    assert not list((copy_of_trt11 / ".staging").glob("*.engine"))
    build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    assert calls == ["vision_encoder", "adaptor", "adaptor", "decoder"]


def test_what_cannot_be_built(
    copy_of_trt11: Path,
    device: Device,
    tiny_bundle: Bundle,
    trt10_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="holds no ONNX for TensorRT; export it with --backend tensorrt"):
        build_engines(tiny_bundle.folder, device=device)
    with pytest.raises(UserError, match="holds no ONNX for TensorRT in int3"):
        build_engines(copy_of_trt11, precision="int3", device=device)
    with pytest.raises(
        UserError,
        match=r"exported for TensorRT 10\.3, but this machine has 11\.4\.1; export it again with --tensorrt 11\.4",
    ):
        build_engines(trt10_bundle.folder, device=device)
    with pytest.raises(UserError, match="capacity must lie between 1 and the model's 1024, got 4096"):
        build_engines(copy_of_trt11, EngineSettings(4096), "fp16", device)
    file = copy_of_trt11 / "tensorrt/fp16/adaptor/adaptor.onnx"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged: tensorrt/fp16/adaptor/adaptor.onnx has"):
        build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    monkeypatch.setattr(engines_module, "import_library", lambda name: device.trt)
    monkeypatch.setattr(engines_module, "import_cuda", lambda: FakeCuda(gpus=0))
    with pytest.raises(
        UserError,
        match=r"built on the GPU that runs them, and none can be used here \(CUDA failed in .*InsufficientDriver",
    ):
        build_engines(copy_of_trt11)


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            "Could not find any implementation for node x due to insufficient workspace",
            "give more than 1 MB by --workspace",
        ),
        (
            "Requested amount of GPU memory could not be allocated",
            "close other programs, or build with a smaller",
        ),
    ],
)
def test_what_tensorrt_says_becomes_a_sentence_with_a_remedy(log: str, sentence: str) -> None:
    from dsvl_export.compilers.engines.build import _refusal

    parsed = SimpleNamespace(file="decoder.onnx", logger=SimpleNamespace(errors=lambda: log))
    assert sentence in _refusal(parsed, EngineSettings(1, workspace_bytes=1_000_000))  # type: ignore[arg-type]


def test_the_whole_way_on_a_fake_gpu(
    jetson: Bundle, rtx: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """build-engine, Pipeline and parity on a machine with a GPU, whose engines compute by ONNX Runtime.

    It proves what this package does with engines (buffers, cache, profiles, graphs, verdicts), not TensorRT.
    """
    folder = Path(shutil.copytree(jetson.folder, tmp_path / "bundle"))
    cuda = FakeCuda(name="Orin", sm=(8, 7))
    contracts = Bundle.open(folder).manifest.contracts["fp16"]
    trt = FakeTensorRT(cuda, contracts, version="10.3.0")
    for module in (engines_module, load, backend):
        monkeypatch.setattr(module, "import_cuda", lambda: cuda)
        monkeypatch.setattr(module, "import_library", lambda name: trt)

    def build(
        trt: ModuleType, file: Path, contract: Contract, settings: EngineSettings, engine: Path
    ) -> None:
        engine.write_bytes(fake_plan(file, contract.component, settings.capacity))

    monkeypatch.setattr(engines_module, "build_engine", build)
    with pytest.raises(UserError, match=r"The engine .* does not exist; run: dsvl-export build-engine"):
        Pipeline.open(folder, "tensorrt", "fp16")
    build_engines(folder, EngineSettings(900), "fp16")
    result = parity(folder, "tensorrt", "fp16")
    assert str(result.execution) == "ran on Orin with 16 multiprocessors with tensorrt 10.3.0"
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert "cudaGraphLaunch" in cuda.names()
    picture = next((folder / "goldens/images").iterdir())
    pipeline = Pipeline.open(folder, "tensorrt", "fp16")
    assert pipeline.capacity == 900  # not the bundle's default, which the engine was not built for
    answer = pipeline.chat("Describe the picture.", [picture])
    cpu = Pipeline.open(folder, "tensorrt", "fp16", device="cpu").chat("Describe the picture.", [picture])
    assert answer.text == cpu.text
    with pytest.raises(
        UserError, match="holds 900 tokens, but a KV cache of 1000 was requested; use at most 900"
    ):
        Pipeline.open(folder, "tensorrt", "fp16", capacity=1000).chat("Describe the picture.", [picture])
    cuda.sm = (8, 9)
    with pytest.raises(
        UserError,
        match=r"cannot run here: its engine was built for SM 87, but this machine has Orin with 16 multiprocessors \(SM 89\); run: dsvl-export build-engine",
    ):
        Pipeline.open(folder, "tensorrt", "fp16")


def test_build_engine_needs_no_torch(copy_of_trt11: Path) -> None:
    """On a Jetson there is none: linting, staging and the manifest without torch, transformers and ONNX Runtime."""
    code = """
import sys
for name in ("torch", "transformers", "onnxruntime"):
    sys.modules[name] = None  # an import of it fails
from types import SimpleNamespace
from dsvl_export import cli
from dsvl_export.exporter import build_engines as engines_module
from runtimes.backends.engines.cuda import Gpu
device = engines_module.Device(SimpleNamespace(__version__="11.4.1"), Gpu("L4", 89, "CUDA 13.0", "x86_64"))
engines_module.Device.here = classmethod(lambda cls: device)
engines_module.build_engine = lambda trt, file, contract, settings, engine: engine.write_bytes(b"plan")
sys.argv = ["dsvl-export", "build-engine", sys.argv[1], "--precision", "fp16"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code, str(copy_of_trt11)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensorrt/fp16/decoder/decoder.engine (4 B)" in done.stdout
    assert Bundle.open(copy_of_trt11).artifact("decoder", "tensorrt", "fp16").engine


def test_a_build_that_was_cut_off_goes_on(
    copy_of_trt11: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while an engine is replaced: the manifest is away then, and comes back."""
    build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    from dsvl_export.exporter import staging

    def full(file: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_json", full)
        with pytest.raises(UserError, match="The build stopped: No space left on device"):
            build_engines(copy_of_trt11, EngineSettings(64, compute_capabilities=(89,)), "fp16", device)
    assert not (copy_of_trt11 / "manifest.json").exists()
    build_engines(copy_of_trt11, EngineSettings(64, compute_capabilities=(89,)), "fp16", device)
    bundle = Bundle.open(copy_of_trt11)
    assert bundle.problems() == []
    engine = bundle.artifact("decoder", "tensorrt", "fp16").engine
    assert engine and engine.capacity == 64


def test_an_interrupted_export_comes_first(copy_of_trt11: Path, device: Device) -> None:
    """Its old manifest, which names files that were replaced, is not published again."""
    staging = Staging(copy_of_trt11)
    staging.open()
    staging.forget("token_embedding")
    staging.close()
    with pytest.raises(
        UserError, match=r"was interrupted \(token_embedding/.* has changed\); run it again, then"
    ):
        build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    assert not (copy_of_trt11 / "manifest.json").exists()
    assert (copy_of_trt11 / ".staging/previous.json").exists()


def test_other_options_build_again_and_another_driver_does_not(
    copy_of_trt11: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(
        trt: ModuleType, file: Path, contract: Contract, settings: EngineSettings, engine: Path
    ) -> None:
        built.append(contract.component)
        engine.write_bytes(b"plan")

    monkeypatch.setattr(engines_module, "build_engine", build)
    build_engines(copy_of_trt11, SETTINGS, "fp16", device)
    build_engines(copy_of_trt11, SETTINGS, "fp16", replace(device, gpu=replace(L4, driver="CUDA 13.1")))
    assert len(built) == 3
    build_engines(copy_of_trt11, replace(SETTINGS, workspace_bytes=1), "fp16", device)
    assert len(built) == 6
    build_engines(copy_of_trt11, replace(SETTINGS, workspace_bytes=1, dla_core=0), "fp16", device)
    assert built[6:] == ["vision_encoder"]
