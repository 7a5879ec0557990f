"""Core AI assets, converted by Apple's tool and executed by Apple's runtime on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from runtimes.backends.coreai import CHUNK, PREFILL, PROGRAM, SIZES, open_asset
from runtimes.backends.registry import load_backend
from runtimes.backends.static_shape import DECODE
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions
from tests.conftest import OraclePair, programs_untouched
from tests.shared import shared_bundle

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed here")
# In fp32, in which the runtime is fast on a CPU; benchmarks/apple_packages.py does the same in fp16.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in float; tests must not change it."""

    def make(folder: Path) -> None:
        with programs_untouched(open_checkpoint("tiny").config, "coreai", ["fp32"]):
            export("tiny", folder, "coreai", ["fp32"], capacity=1024)

    yield from shared_bundle(tmp_path_factory, "coreai", make)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int4", marks=pytest.mark.full)])
def test_every_precision_passes_parity(bundle: Bundle, precision: str, tmp_path: Path) -> None:
    if precision != "fp32":
        folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
        with programs_untouched(open_checkpoint("tiny").config, "coreai", ["int4-fp32"]):
            bundle = export("tiny", folder, "coreai", ["int4-fp32"])
    result = parity(bundle, "coreai", precision, task=load_task(HELDOUT)[::24])
    assert result.execution.kind == "ran"
    assert "Apple's runtime" in str(result.execution)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    if precision == "fp32":
        assert all(stage.errors.relative_rms < 1e-5 for stage in result.stages if stage.errors)


@pytest.mark.parametrize(
    "pair", ["siglip", pytest.param("hybrid", marks=pytest.mark.full)], indirect=True
)  # tiny is a hybrid
def test_random_checkpoints_of_both_variants(pair: OraclePair, tmp_path: Path) -> None:
    made = export(pair.checkpoint.folder, tmp_path / "b", "coreai", ["fp32"], capacity=256)
    result = parity(made, taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert all(
        "Core AI assets cannot have taps" in localization.note for localization in result.localizations
    )


@pytest.mark.full
def test_half_precision_converts_and_runs(one_layer: Path, tmp_path: Path) -> None:
    """A few tokens: the runtime multiplies halves one by one on a CPU, and adds them up in half precision."""
    bounds = {"fp32": 1e-9, "fp16": 2e-2, "int8-fp16": 0.3, "int4-fp16": 0.5, "palette4-fp16": 0.5}
    made = export(
        one_layer, tmp_path / "b", "coreai", [name.removesuffix("-fp16") for name in bounds], goldens=False,
        capacity=32,
    )  # fmt: skip
    expected = None
    x = np.random.default_rng(0).normal(size=(1, 2, 96)) / 2
    for precision, bound in bounds.items():
        contract = made.manifest.contracts[precision]["decoder"]
        file = made.path(made.artifact("decoder", "coreai", precision).files[0])
        session = load_backend("coreai").open_decoder(file, contract, SessionOptions())
        logits = session.decode(x.astype(contract.inputs[0].dtype), np.array([0, 1]), session.new_cache(1, 8))
        expected = logits if expected is None else expected
        assert relative_rms(logits, expected) < bound
    assert made.manifest.contracts["fp16"]["decoder"].states[0].dtype == "float16"


def test_entry_points_share_their_weights(bundle: Bundle) -> None:
    artifact = bundle.artifact("decoder", "coreai", "fp32")
    sizes = read_json(bundle.path(artifact.files[0]).parent / SIZES)
    assert list(sizes) == [DECODE, PREFILL]
    assert sizes[PREFILL] == {"batch": 1, "sequence": CHUNK, "rows": 1, "capacity": 1024}
    stored = bundle.manifest.files[artifact.files[0]].bytes
    assert artifact.files[0].endswith(PROGRAM)
    assert stored < 1.05 * parameter_bytes(bundle)


def parameter_bytes(bundle: Bundle) -> int:
    """Bytes of the decoder's parameters and RoPE tables in fp32."""
    model = bundle.manifest.model["decoder"]
    width, layers = model["width"], model["layers"]
    heads, kv_heads, head_dim = model["heads"], model["kv_heads"], width // model["heads"]
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    each = attention + 3 * width * model["mlp_width"] + 2 * width
    tables = model["max_positions"] * head_dim
    return 4 * (layers * each + width + width * model["vocab_size"] + tables)


def test_it_answers_and_prints_nothing(
    bundle: Bundle, pictures: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.open(bundle, "coreai", "fp32")
    assert pipeline.chat("What colour is the shape?", pictures[:1]).text
    assert capfd.readouterr() == ("", "")
    assert pipeline.capacity == 1024


def test_damaged_assets_are_named(bundle: Bundle, tmp_path: Path) -> None:
    contract = bundle.manifest.contracts["fp32"]["adaptor"]
    source = bundle.path(bundle.artifact("adaptor", "coreai", "fp32").files[0]).parent
    folder = Path(shutil.copytree(source, tmp_path / source.name))
    whole = (folder / PROGRAM).read_bytes()
    for content in (whole[: len(whole) // 2], b"nonsense" * 100):
        (folder / PROGRAM).write_bytes(content)
        with pytest.raises(UserError, match=r"Core AI"):
            open_asset(folder / PROGRAM, contract)
    (folder / PROGRAM).write_bytes(whole)
    (folder / SIZES).unlink()
    with pytest.raises(UserError, match="adaptor.aimodel.* is missing"):
        open_asset(folder / PROGRAM, contract)
