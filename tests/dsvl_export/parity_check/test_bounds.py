"""The measures and bounds of the parity check: what fails, what passes, and where they come from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsvl_export.parity_check import parity
from dsvl_export.parity_check.metrics import Errors, LogitAgreement, channel_error, tie_margin
from dsvl_export.parity_check.quantization_error import QuantizationError, read_quantization_error
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.parity_check.result import ParityResult, StageResult
from dsvl_export.parity_check.tolerances import load_tolerances
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.session import Execution
from tests.dsvl_export.parity_check.faults import plant, rehash, weight, zeroed

FP32, FP16 = ("onnxruntime", "fp32"), ("onnxruntime", "fp16")


def test_measures() -> None:
    errors = Errors()
    expected = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert errors.add(2, "x", expected + np.array([[0, 0], [0, 0.5]]), expected, 0.2)
    assert errors.relative_rms == pytest.approx(0.1)
    assert errors.snr_db == pytest.approx(20)
    assert (errors.golden, errors.tensor, errors.index, errors.max_abs) == (2, "x", (1, 1), 0.5)
    assert errors.cosine == pytest.approx(5 / math.sqrt(25.25))
    # A larger error within a wider bound does not displace it; a smaller one beyond its bound does.
    assert errors.add(3, "y", expected * 1.2, expected, 1.0)
    assert errors.tensor == "x"
    assert not errors.add(4, "z", expected * 1.05, expected, 0.01)
    assert (errors.tensor, errors.golden, errors.bound) == ("z", 4, 0.01)


def test_top1_agreement() -> None:
    expected = np.array([[2.0, 1.99, -4.0], [5.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    actual = np.array([[1.99, 2.0, -4.0], [1.0, 5.0, 0.0], [1.0, 0.0, 0.0]])
    agreement = LogitAgreement()
    assert agreement.add(actual, expected, tie_error=0.01) == 1
    assert (agreement.rows, agreement.top1_equal, agreement.near_ties, agreement.flips) == (3, 1, 1, 1)
    p = np.exp(expected[1]) / np.exp(expected[1]).sum()
    assert agreement.kl_max == pytest.approx((p[0] - p[1]) * 4)
    assert tie_margin(expected[0], 0.01) == pytest.approx(
        2 * 0.01 * np.sqrt(2) * np.sqrt((4 + 1.99**2 + 16) / 3)
    )


def test_nan_never_passes() -> None:
    stage = StageResult("adaptor")
    stage.compare(0, "x", np.ones(4), np.ones(4), 1e-4)
    assert stage.state == "passed"
    stage.compare(1, "x", np.array([1, np.nan, 1, 1]), np.ones(4), 1e-4)
    stage.compare(2, "x", np.ones(4), np.ones(4), 1e-4)
    assert stage.state == "failed"
    assert stage.detail == "NaN or infinity in x of golden 1"
    assert stage.errors
    assert (stage.errors.golden, stage.errors.index) == (1, (1,))
    result = ParityResult("b", "fp32", Execution("ran"), "r")
    result.stages[2] = stage
    raw = result.to_dict()["stages"][2]["errors"]
    assert raw["relative_rms"] is raw["max_abs"] is raw["snr_db"] is None
    other = StageResult("adaptor")
    other.compare(0, "x", np.ones((2, 4)), np.ones((2, 5)), 1.0)
    assert (other.state, other.detail) == ("failed", "x is [2, 4], expected [2, 5]")


def test_bounds_follow_the_quantization_error_of_the_checkpoint(tiny_bundle: Bundle) -> None:
    """QuantizationError of the rounded reference widens a bound up to the ceiling, and never narrows it."""
    tolerance = load_tolerances()["fp16"]
    assert tolerance.bound("adaptor") == pytest.approx(7e-3)
    assert tolerance.bound("adaptor", 1e-5) == tolerance.bound("adaptor")
    assert tolerance.bound("adaptor", 4e-3) == pytest.approx(2e-2)
    assert tolerance.bound("adaptor", 1.0) == tolerance.ceiling
    assert tolerance.bound("preprocess", 1.0) == 0
    assert load_tolerances()["fp32"].bound("adaptor", 1.0) == pytest.approx(1e-4)
    measured = read_quantization_error(tiny_bundle, "fp16")
    assert len(measured.goldens) == 10
    assert read_quantization_error(tiny_bundle, "fp32") == QuantizationError()
    largest = max(measured.goldens[index]["vision_encoder"] for index in range(8))  # drawings, as in training
    assert largest < tolerance.quantization_error
    # What the rounded reference says is what ONNX Runtime's half precision has, within three times.
    (vision,) = [
        stage for stage in parity(tiny_bundle, precision="fp16").stages if stage.name == "vision_encoder"
    ]
    assert vision.errors
    assert vision.errors.quantization_error
    assert 1 / 3 < vision.errors.relative_rms / vision.errors.quantization_error < 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fp16: {1: 2, foo: 3}", "unknown keys for fp16: 1, foo"),
        ("fp16: {factor: 2026-13-45}", "is not valid YAML: month must be in"),
        ("fp16: {factor: !!timestamp foo}", "is not valid YAML"),
        (f"fp16: {{factor: 1{400 * '0'}}}", "has more than 64 bits"),
        ("fp16: {nosie: 1}", "unknown keys for fp16: nosie. Valid keys: ceiling, factor"),
        ("fp16: {stages: {adapter: 1}}", "fp16.stages has unknown stages. Valid stages: preprocess"),
        (
            "fp16: {quantization_error: high}",
            "fp16.quantization_error must be a number of at least 0, got 'high'",
        ),
        ("fp16: {stages: {adaptor: -1}}", "fp16.stages.adaptor must be a number of at least 0, got -1"),
        ("fp16: {factor: .nan}", "is not a finite number"),
        ("fp16: 3", "unknown keys for fp16: 3"),
        ("int9: {factor: 1}", "must set all keys of the new precision int9"),
        ("- 1", "must map precisions to tolerances"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_tolerances(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_tolerances(tmp_path / "t.yaml")
    with pytest.raises(UserError, match="is missing"):
        load_tolerances(tmp_path / "absent.yaml")


def test_tolerances_of_ones_own(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("fp32:\n  stages:\n    adaptor: 1e-9\n")
    table = load_tolerances(tmp_path / "t.yaml")
    assert table["fp16"] == load_tolerances()["fp16"]
    result = parity(tiny_bundle, precision="fp32", tolerances=table)
    assert [stage.name for stage in result.stages if stage.state == "failed"] == ["adaptor"]
    with pytest.raises(UserError, match="no tolerance for the precision 'fp16'"):
        parity(tiny_bundle, precision="fp16", tolerances={"fp32": table["fp32"]})


def test_tolerances_with_the_names_of_0_4(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("fp32: {noise: 2, drift_factor: 3, rungs: {adaptor: 4}}\n")
    row = load_tolerances(tmp_path / "t.yaml")["fp32"]
    assert (row.quantization_error, row.tap_factor, row.stages) == (2, 3, {"adaptor": 4})


def test_one_lost_row_of_a_large_head_is_found() -> None:
    """The whole tensor's error is below the bound of fp16 there, and its cosine 0.999996."""
    random = np.random.default_rng(0)
    expected = random.normal(size=(32, 102_400))
    actual = expected * (1 + 1e-3 * random.normal(size=expected.shape))
    stage = StageResult("prefill_logits")
    stage.compare(0, "logits", actual, expected, 7e-3)
    assert stage.state == "passed"
    actual[:, 1234] = 0
    stage.compare(1, "logits", actual, expected, 7e-3)
    assert stage.errors
    assert stage.errors.relative_rms < 7e-3
    assert stage.errors.cosine > 0.99999
    assert (stage.state, stage.detail) == ("failed", "a single channel of logits is wrong in golden 1")


def test_large_channels_count_relative_to_themselves() -> None:
    """Outlier channels, which real models have, have large absolute errors."""
    random = np.random.default_rng(0)
    expected = random.normal(size=(64, 512))
    expected[:, 7] *= 3000
    actual = expected * (1 + 1e-3 * random.normal(size=expected.shape))
    assert channel_error(actual, expected) < 2e-3


@pytest.mark.parametrize(
    "content", ["{}", '{"goldens": [1], "taps": {}}', '{"goldens": [], "taps": []}',
                '{"goldens": [{"adaptor": "x"}], "taps": {}}', '{"goldens": [{"adaptor": -1}], "taps": {}}'],
)  # fmt: skip
def test_damaged_quantization_errors(bundle_copy: Path, content: str) -> None:
    (bundle_copy / "quantization_error/fp16/quantization_error.json").write_text(content)
    with pytest.raises(
        UserError, match="is not a readable file of quantization errors; export the bundle again"
    ):
        parity(rehash(bundle_copy, "quantization_error/fp16/quantization_error.json"), precision="fp16")


def test_overridden_tolerances_leave_a_mark(bundle_copy: Path) -> None:
    loose = {name: replace(row, quantization_error=1.0) for name, row in load_tolerances().items()}
    bundle = plant(
        bundle_copy, "fp32", "decoder", weight("layers.0.mlp.up_proj.weight_transposed", zeroed(3))
    )
    result = parity(bundle, precision="fp32", tolerances=loose)
    assert result.overridden
    record_verdict(bundle, result)
    assert Bundle.open(bundle_copy).manifest.parity["onnxruntime/fp32"]["tolerances"] == "overridden"
    others = {**load_tolerances(), "fp16": loose["fp16"]}
    assert not parity(bundle, precision="fp32", tolerances=others).overridden  # no row that counts
    none = {name: replace(row, quantization_error=0.0) for name, row in load_tolerances().items()}
    record_verdict(bundle, parity(bundle, precision="fp32", tolerances=none))  # a report without any bound
