"""Quantized bundles: the parity check, the numbers that each precision has to reach, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.scale_table import ScaleTable
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from dsvl_export.planning.plan import Planner, Request
from dsvl_export.quantization.calibrate import CalibrationOptions, calibrate
from dsvl_export.targets.targets import find_target, measure_target
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from reference.trace import TRACED_COMPONENTS
from runtimes.backends.onnxruntime_releases import NEEDED, newest_release, release_for_precision
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from tests.conftest import OraclePair
from tests.grids import variants_by_precision
from tests.shared import shared_bundle

# Precision → share of fp32's accuracy that it has to reach on the held-out questions.
WANTED = {
    "int8-int4": 0.99, "int8": 0.99, "fp8": 0.99, "int4": 0.99, "int8-weights": 0.999, "kv-int8": 0.999,
    "8da4w-g128": 0.99, "8da8w": 0.99,
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(quantized_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in all these precisions, some of which other files test too; tests must not change it."""

    def make(folder: Path) -> None:
        shutil.copytree(quantized_bundle.folder, folder)
        export("tiny", folder, precisions=tuple(WANTED))

    yield from shared_bundle(tmp_path_factory, "all-quantized", make)


@pytest.fixture
def quantized_copy(quantized: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized.folder, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("fixture", "precision"),
    [
        ("quantized_bundle", "8da4w-g128"),
        *(pytest.param("quantized", name, marks=pytest.mark.full) for name in WANTED if name != "8da4w-g128"),
    ],
)
def test_precisions_pass_parity(request: pytest.FixtureRequest, fixture: str, precision: str) -> None:
    """All stages, all taps within their bounds, and the accuracy that is asked of the precision."""
    bundle = request.getfixturevalue(fixture)
    result = parity(bundle, precision=precision, task=load_task(HELDOUT), taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert result.task
    assert result.task.accuracy_ratio
    assert result.task.accuracy_ratio >= WANTED[precision]
    assert not any(localization.first for localization in result.localizations)
    logits = result.stage("teacher_forced_logits").errors
    assert logits
    assert 1e-4 < logits.relative_rms < 0.5  # it is quantized, and it is no noise


@pytest.mark.full
def test_a_file_needs_the_release_that_the_table_gives_its_precision(quantized: Bundle) -> None:
    """``doctor`` names precisions, ``run`` reads what the export found in the files."""
    for precision in WANTED:
        artifacts = [item for item in quantized.manifest.artifacts if item.precision == precision]
        found = newest_release([item.tools[NEEDED] for item in artifacts])
        assert found == release_for_precision(precision), precision
        for item in artifacts:
            opset = onnx.load(str(quantized.path(item.files[0])), load_external_data=False).opset_import[0]
            keeps_norm = item.component == "decoder" and precision in (
                "int4",
                "int8-int4",
                "int8-weights",
                "kv-int8",
            )
            assert opset.version == (23 if keeps_norm else 21), (precision, item.component)


@pytest.mark.full
def test_bytes(quantized: Bundle) -> None:
    """A quarter and less of fp32, and what plan says."""
    source = open_checkpoint("tiny")
    planner = Planner(source.config, source.embedding_bytes())
    cpu = measure_target(find_target("cpu"))
    floats = sum(
        4 * tensor.numel()
        for name in TRACED_COMPONENTS
        for tensor in getattr(source.load_model(), name).parameters()
    )
    for precision, share in (("int8", 0.33), ("int4", 0.29)):
        plan = planner.plan(cpu, Request("onnxruntime", precision, 200))
        assert plan.exact
        for component in TRACED_COMPONENTS:
            files = quantized.artifact(component, "onnxruntime", precision).files
            found = sum(quantized.manifest.files[name].bytes for name in files)
            assert plan.artifacts[component] == pytest.approx(found, rel=0.02)
        assert plan.artifact_bytes < share * floats
    states = quantized.manifest.contracts["kv-int8"]["decoder"].states
    assert {state.dtype for state in states} == {"int8"}


@pytest.mark.full
def test_a_fault_in_quantized_weights_is_found_in_its_layer(quantized_copy: Path) -> None:
    """One scale twice as large in the file."""
    from tests.dsvl_export.parity_check.test_parity import rehash

    for precision, name, tap in (
        ("int8", "layers.2.mlp.down_proj", "layers.2"),
        ("int4", "layers.1.self_attn.o_proj", "layers.1"),
    ):
        path = f"onnxruntime/{precision}/decoder/decoder.onnx"
        model = onnx.load(str(quantized_copy / path))
        kinds = {"DequantizeLinear": 1, "MatMulNBits": 2}  # the input that is the weight's scale
        (scale,) = [
            node.input[kinds[node.op_type]]
            for node in model.graph.node
            if node.op_type in kinds
            and any(f"{name}/quantize_per_channel" in source for source in node.input)
        ]
        (tensor,) = [item for item in model.graph.initializer if item.name == scale]
        tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
        onnx.save(model, str(quantized_copy / path))
        result = parity(rehash(quantized_copy, path), precision=precision)
        assert result.verdict == "failed"
        assert [(localization.component, localization.first) for localization in result.localizations] == [
            ("decoder", tap)
        ]


@pytest.mark.full
def test_a_plan_of_ones_own(tmp_path: Path, tiny_bundle: Bundle) -> None:
    """A YAML file as precision, with scales tuned for it; noise and verdict follow."""
    (tmp_path / "mixed.yaml").write_text(
        "kv_cache: int8\nrules:\n- {layers: 'vision_encoder.high.*', precision: int8}\n"
        "- {layers: 'decoder.layers.*', precision: int4-g64}\n- {layers: 'decoder.layers.0.*', precision: fp8}\n"
    )
    source = open_checkpoint("tiny")
    options = CalibrationOptions(samples=12, tune=str(tmp_path / "mixed.yaml"))
    done = calibrate(source, tmp_path / "scales", options)
    assert done.table.tuned_for == "mixed"
    assert {weight.precision for weight in done.table.tuned.values()} == {"int4-g64"}
    bundle = export(
        "tiny", tmp_path / "b", precisions=[str(tmp_path / "mixed.yaml")], scales=tmp_path / "scales"
    )
    assert {"precisions/mixed/mixed.yaml", "precisions/mixed/scales.json"} <= bundle.manifest.files.keys()
    assert parity(bundle).passed
    assert parity(bundle, live="tiny").passed
    assert ScaleTable.load(bundle.folder / "precisions/mixed").digest == done.table.digest
    answer = Pipeline.open(bundle).chat("Describe the picture.", [HELDOUT.parent / "images/0002.png"])
    assert answer.text
    # Another table redoes the artifacts, the same one does not.
    again = calibrate(source, tmp_path / "other", CalibrationOptions(samples=12, method="minmax"))
    states: dict[str, str] = {}
    for scales in (tmp_path / "scales", tmp_path / "other"):
        export(
            "tiny", tmp_path / "b", precisions=[str(tmp_path / "mixed.yaml")], scales=scales,
            report=lambda progress: states.update({progress.stage: progress.state}),
        )  # fmt: skip
        expected = "reused" if scales.name == "scales" else "finished"
        assert states["onnxruntime/mixed/decoder"] == states["precisions/mixed"] == expected
    assert ScaleTable.load(tmp_path / "b/precisions/mixed").digest == again.table.digest


def test_a_plan_that_quantizes_nothing(tmp_path: Path) -> None:
    """It has a name of its own and is a precision like others; so a bundle is never left half-made."""
    (tmp_path / "half.yaml").write_text("base: fp16")
    bundle = export("tiny", tmp_path / "b", precisions=[str(tmp_path / "half.yaml")])
    assert bundle.manifest.contracts["half"]["adaptor"].outputs[0].dtype == "float16"
    assert parity(bundle).passed


def test_a_replaced_plan_takes_its_artifacts_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the plan and the components, the old components do not count as the new plan's."""
    file = tmp_path / "mine.yaml"
    file.write_text("rules: [{layers: 'decoder.*', precision: int8-weights}]")
    export("tiny", tmp_path / "b", precisions=[str(file)], goldens=False)
    file.write_text("rules: [{layers: 'decoder.*', precision: int4}]")

    def stop(progress: object) -> None:
        if getattr(progress, "stage", "").endswith("mine/vision_encoder"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export("tiny", tmp_path / "b", precisions=[str(file)], goldens=False, report=stop)
    bundle = export("tiny", tmp_path / "b", precisions=["fp32"], goldens=False)
    assert bundle.choices() == [("onnxruntime", "fp32")]


def test_requests_that_cannot_be(tmp_path: Path, hybrid_pair: OraclePair) -> None:
    folder = hybrid_pair.checkpoint.folder
    for precision, sentence in (
        ("int4", "group size 32 does not divide the 100 inputs of decoder.layers.0.mlp.down_proj"),
        ("nowhere.yaml", "is missing"),
    ):
        with pytest.raises(UserError, match=sentence):
            export(folder, tmp_path / "b2", precisions=[precision])
    for name, base in (("a", "fp16"), ("b", "fp32")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.yaml").write_text(f"base: {base}")
    with pytest.raises(UserError, match="Two precision plans are called 'same'"):
        export("tiny", tmp_path / "b2", precisions=[str(tmp_path / name / "same.yaml") for name in "ab"])
    (tmp_path / "cache.yaml").write_text("kv_cache: fp8")
    with pytest.raises(UserError, match="onnxruntime has no KV cache in fp8; the nearest is int8"):
        export("tiny", tmp_path / "b2", precisions=[str(tmp_path / "cache.yaml")])
    calibrate(open_checkpoint("tiny"), tmp_path / "scales", CalibrationOptions(samples=2, rows=0))
    with pytest.raises(UserError, match="The scale table was made for the checkpoint"):
        export(folder, tmp_path / "b2", precisions=["int8"], scales=tmp_path / "scales")
    raw = json.loads((tmp_path / "scales/scales.json").read_text())
    del raw["activations"]["adaptor.layers.1"]
    (tmp_path / "scales/scales.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="no scale for the input of adaptor.layers.1"):
        export("tiny", tmp_path / "b2", precisions=["int8"], scales=tmp_path / "scales")
    for part in ((2, 1), (0, 1), (5, 9)):
        with pytest.raises(UserError, match="There is no part|has no samples"):
            calibrate(open_checkpoint("tiny"), tmp_path / "s", CalibrationOptions(samples=2, part=part))
    assert not (tmp_path / "b2").exists()


@variants_by_precision({"siglip": ("kv-int8",), "hybrid": ("int8-weights",)}, "int8", "fp8")
def test_random_models_pass_parity(pair: OraclePair, precision: str, tmp_path: Path) -> None:
    bundle = export(pair.checkpoint.folder, tmp_path / "b", precisions=[precision])
    result = parity(bundle, taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert np.isfinite([stage.errors.relative_rms for stage in result.stages if stage.errors]).all()
