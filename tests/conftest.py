"""Shared fixtures: random checkpoints of both variants and layouts, and bundles exported from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from calibration.precision_plan import PrecisionPlan
from calibration.quantized_program import trace_with_plan
from dsvl_export.compilers.precisions import plan_for
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.exporter.build_engines import Device, build_engines
from dsvl_export.exporter.export import export
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.model.config import ModelConfig
from reference.model.deepseek_vl import DeepSeekVL
from reference.trace import TRACED_COMPONENTS
from runtimes.backends.engines.backend import find_gpu
from runtimes.bundle.bundle import Bundle
from tests.adapters import MODULES, write_decoder_adapter
from tests.calibration.calibrated import random_calibrated, tiny_calibrated
from tests.dsvl_export.cli.command_line import optimum
from tests.fixtures import bundle_copy, pictures, state_folder, tiny_copy
from tests.oracles.models import hybrid_oracle, janus_oracle, save_oracle, siglip_oracle
from tests.shared import made_once, shared_bundle

torch.manual_seed(0)
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` run wherever TensorRT and a GPU are."""
    gpu, reason = find_gpu() if item.get_closest_marker("gpu") else (None, "")
    if item.get_closest_marker("gpu") and gpu is None:
        pytest.skip(f"it would prove the numbers on a GPU itself, but {reason}")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """ONNX Runtime's sessions have one thread where a test gives no number.

    A second one takes three times the CPU time for tiny: it spins while it waits.
    """
    import onnxruntime

    class SessionOptions(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", SessionOptions)
        yield


__all__ = [  # fixtures that several packages share
    "bundle_copy", "pictures", "random_calibrated", "state_folder", "tiny_calibrated", "tiny_copy",
]  # fmt: skip


@dataclass(frozen=True)
class OraclePair:
    """A transformers model and our reference loaded from the checkpoint that it saved."""

    oracle: transformers.PreTrainedModel
    model: DeepSeekVL
    checkpoint: Checkpoint


def _pair(oracle: transformers.PreTrainedModel, folder: Path) -> OraclePair:
    save_oracle(oracle, folder)
    checkpoint = open_checkpoint(str(folder))
    return OraclePair(oracle, checkpoint.load_model(), checkpoint)


@pytest.fixture(scope="session")
def siglip_pair(tmp_path_factory: pytest.TempPathFactory) -> OraclePair:
    """The 1.3B's architecture, small, in transformers' layout."""
    return _pair(siglip_oracle(), tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def hybrid_pair(tmp_path_factory: pytest.TempPathFactory) -> OraclePair:
    """The 7B's architecture, small, in transformers' layout."""
    return _pair(hybrid_oracle(), tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="session")
def janus_pair(tmp_path_factory: pytest.TempPathFactory) -> OraclePair:
    """Janus's architecture, small, in transformers' layout."""
    return _pair(janus_oracle(), tmp_path_factory.mktemp("janus"))


VARIANTS = (
    "siglip",
    "hybrid",
    pytest.param("janus", marks=pytest.mark.full),
)  # Janus's oracles are in every run


@pytest.fixture(scope="session", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> OraclePair:
    return request.getfixturevalue(f"{request.param}_pair")


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose decoder has one layer and one KV head, and sizes that groups of 32 divide."""

    def make(folder: Path) -> None:
        save_oracle(siglip_oracle(num_key_value_heads=1, num_hidden_layers=1, intermediate_size=128), folder)

    return made_once(tmp_path_factory, "one-layer", make)


@contextmanager
def programs_untouched(config: ModelConfig, backend: str, precisions: Sequence[str]) -> Iterator[None]:
    """Exports of one process share traced programs: one that is made meanwhile leaves them as they were traced."""

    def lines(plan: PrecisionPlan, component: str) -> list[str]:
        program = trace_with_plan(config, component, plan).program
        nodes = [f"{node.format_node()} {node.meta.get('val')}" for node in program.graph.nodes]
        return [*nodes, str(program.graph_signature)]

    trace_with_plan.cache_clear()
    plans = [plan_for(load_compiler(backend), precision) for precision in precisions]
    cases = [(plan, component) for plan in plans for component in TRACED_COMPONENTS]
    before = [lines(*case) for case in cases]
    traced = trace_with_plan.cache_info().misses
    yield
    after = [lines(*case) for case in cases]
    assert trace_with_plan.cache_info().misses == traced  # the export took these; else it would say nothing
    assert after == before


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The tiny checkpoint in fp32 and fp16; tests must not change it."""

    def make(folder: Path) -> None:
        precisions = ("fp32", "fp16")
        with programs_untouched(open_checkpoint("tiny").config, "onnxruntime", precisions):
            export("tiny", folder, precisions=precisions)

    yield from shared_bundle(tmp_path_factory, "tiny", make)


@pytest.fixture(scope="session")
def quantized_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in float, in int8, and in 4-bit weights with 8-bit activations; tests must not change it."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_bundle.folder, folder)
        export("tiny", folder, precisions=("int8", "8da4w", "8da4w-g128"))

    yield from shared_bundle(tmp_path_factory, "quantized", make)


@pytest.fixture(scope="session")
def random_bundle(pair: OraclePair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A random checkpoint of either variant in fp32 and fp16; tests must not change it."""
    checkpoint = pair.checkpoint
    yield from shared_bundle(
        tmp_path_factory,
        f"random-{pair.oracle.config.model_type}",
        lambda folder: export(checkpoint.folder, folder, precisions=("fp32", "fp16")),
    )


@pytest.fixture(scope="session")
def decoder_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for tiny's decoder: on all its layers, and of several ranks on some."""

    def make(folder: Path) -> None:
        write_decoder_adapter(folder / "all", modules=(*MODULES, "head"))
        patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 9}}
        write_decoder_adapter(
            folder / "some", 3, ("v_proj", "down_proj"), 1.0, 1, use_rslora=True, **patterns
        )

    folder = made_once(tmp_path_factory, "decoder-adapters", make)
    return {name: folder / name for name in ("all", "some")}


@pytest.fixture(scope="session")
def switchable_bundle(
    decoder_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bundle]:
    """Tiny with both adapters, the second with a weight; tests must not change it."""
    named = [f"all={decoder_adapters['all']}", f"some={decoder_adapters['some']}=0.5"]
    precisions = ("fp32", "fp16", "int4", "8da4w-g128")
    yield from shared_bundle(
        tmp_path_factory,
        "switchable",
        lambda folder: export(
            "tiny", folder, precisions=precisions, goldens=False, switchable_adapters=named
        ),
    )


@pytest.fixture
def switchable_copy(switchable_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy whose adapters may be changed."""
    return Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def trt11_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The tiny checkpoint's ONNX for TensorRT 11; tests must not change it."""

    def make(folder: Path) -> None:
        precisions = ("fp32", "fp16")
        with programs_untouched(open_checkpoint("tiny").config, "tensorrt", precisions):
            export("tiny", folder, "tensorrt", precisions, goldens=False, tensorrt="11.4", capacity=256)

    yield from shared_bundle(tmp_path_factory, "trt11", make)


@pytest.fixture(scope="session")
def trt10_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The tiny checkpoint's ONNX for the TensorRT 10.3 of JetPack 6; tests must not change it."""

    def make(folder: Path) -> None:
        export("tiny", folder, "tensorrt", ("fp32", "fp16"), goldens=False, tensorrt="10.3", capacity=256)

    yield from shared_bundle(tmp_path_factory, "trt10", make)


@pytest.fixture(scope="session")
def apple_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny for Core ML and Core AI with a small cache; tests must not change it."""

    def make(folder: Path) -> None:
        export("tiny", folder, "coreml", ["fp16"], goldens=False, capacity=64)
        export("tiny", folder, "coreai", ["fp32"], goldens=False, capacity=64)

    yield from shared_bundle(tmp_path_factory, "apple", make)


@pytest.fixture(scope="session")
def executorch_bundle(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A small model for ExecuTorch in float, by way of optimum's command line; tests must not change it."""

    def make(folder: Path) -> None:
        done = optimum(
            "--model", str(one_layer), "--backend", "executorch", "--precision", "fp32",
            "--no-parity", "--output", str(folder),
        )  # fmt: skip
        assert done.code == 0, done.err

    yield from shared_bundle(tmp_path_factory, "executorch", make)


@pytest.fixture(scope="session")
def openvino_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny for OpenVINO in some precisions; tests must not change it."""

    def make(folder: Path) -> None:
        export("tiny", folder, "openvino", ("fp32", "bf16", "int4"))

    yield from shared_bundle(tmp_path_factory, "openvino", make)


@pytest.fixture(scope="session")
def engine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny with engines of TensorRT for this machine's GPU, in the dialect of this machine's TensorRT."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed here")

    def make(folder: Path) -> None:
        version = ".".join(Device.here().trt.__version__.split(".")[:2])
        export("tiny", folder, "tensorrt", ["fp16", "int8"], tensorrt=version)
        build_engines(folder)

    yield from shared_bundle(tmp_path_factory, "engines", make)
