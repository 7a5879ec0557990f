"""Layers one by one: faults that hide in a precision's own error are found, and the faulty layer is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dsvl_export.parity_check import parity
from dsvl_export.parity_check.layers import INPUTS, outputs_file
from dsvl_export.parity_check.result import ParityResult
from reference.checkpoint.checkpoint import open_checkpoint
from reference.goldens.layers import layer_golden_bytes, layer_taps
from reference.taps import component_taps, record_taps
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.layers import LayerInputs, load_tables, sample_rows
from tests.conftest import OraclePair
from tests.dsvl_export.parity_check.faults import Edit, plant, rehash, scaled, weight


def first_wrong(result: ParityResult) -> str:
    stage = result.stage("layers")
    assert stage.state == "failed"
    return stage.detail


@pytest.mark.parametrize("precision", ["int8", "8da4w"])
def test_sound_layers_pass_far_below_the_error_of_the_precision(
    quantized_bundle: Bundle, precision: str
) -> None:
    result = parity(quantized_bundle, precision=precision)
    assert result.passed
    errors = result.stage("layers").errors
    assert errors
    assert errors.quantization_error is not None
    assert errors.relative_rms < 0.25 * max(errors.quantization_error, 1e-4)


def swapped(values: np.ndarray) -> np.ndarray:
    values[..., [3, 4]] = values[..., [4, 3]]
    return values


QUANTIZED_FAULTS: list[tuple[str, str, str, Edit]] = [
    ("int8", "decoder", "layers.1",
     weight("layers.1.self_attn.k_proj/quantize_per_channel_folded_codes", swapped)),
    ("int8", "decoder", "layers.2", weight("layers.2.mlp.up_proj/to_folded_4_of_codes", scaled(1.3))),
    ("int8", "vision_encoder", "low.blocks.1", weight("low.blocks.1.norm1.bias", scaled(1.3))),
    ("8da4w", "decoder", "layers.3", weight("layers.3.mlp.down_proj/to_folded_2_of_blocks", scaled(1.3))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "component", "tap", "edit"),
    QUANTIZED_FAULTS,
    ids=lambda v: v[:20] if isinstance(v, str) else "edit",
)
def test_faults_in_quantized_layers_are_located(
    quantized_bundle: Bundle, tmp_path: Path, precision: str, component: str, tap: str, edit: Edit
) -> None:
    copy = Path(shutil.copytree(quantized_bundle.folder, tmp_path / "bundle"))
    result = parity(plant(copy, precision, component, edit), precision=precision)
    assert result.exit_code == 1
    assert first_wrong(result).startswith(f"{component}: {tap} is wrong on its recorded input")


def test_layers_of_random_models_have_the_planned_size(pair: OraclePair, random_bundle: Bundle) -> None:
    """That they pass is tested in ``test_localization``."""
    written = [random_bundle.path(path).stat().st_size for path in (INPUTS, outputs_file("fp16"))]
    for size, most in zip(written, layer_golden_bytes(pair.checkpoint.config), strict=True):
        assert size < most + 20_000  # the header


def test_a_layer_computes_on_what_it_is_handed() -> None:
    """Handed its own taps, a model gives what it gives by itself; another tap changes what reads it alone."""
    source = open_checkpoint("tiny")
    model = source.load_model()
    taps = component_taps(source.config, "adaptor")
    torch.manual_seed(0)
    features = [
        torch.randn(1, 64, width).half()
        for width in (model.adaptor.high_up_proj.in_features, model.adaptor.low_up_proj.in_features)
    ]
    with record_taps(model.adaptor, taps) as table:
        expected = model.adaptor(*(item.float() for item in features))
    names = ("high_features", "low_features")
    inputs = {"adaptor": {name: item.numpy() for name, item in zip(names, features, strict=True)}}
    alone = LayerInputs("", inputs, {"adaptor": {}})
    found = layer_taps(model, source.config, alone, torch.float32, components=("adaptor",))["adaptor"]
    assert torch.equal(found["layers.1"], expected)
    given = {name: tensor.numpy().astype(np.float16) for name, tensor in table.items()}
    given["layers.0"] = given["layers.0"] * 0
    handed = LayerInputs("", inputs, {"adaptor": given})
    found = layer_taps(model, source.config, handed, torch.float32, components=("adaptor",))["adaptor"]
    assert torch.allclose(found["layers.0"], table["layers.0"], atol=2e-2)
    bias = model.adaptor.get_submodule("layers.1").bias
    assert torch.allclose(found["layers.1"], bias.expand_as(found["layers.1"]))


def test_bundles_without_layer_goldens_are_judged_without(bundle_copy: Path) -> None:
    """Those of earlier releases."""
    bundle = Bundle.open(bundle_copy)
    for path in [path for path in bundle.manifest.files if path.startswith("layers/")]:
        del bundle.manifest.files[path]
    result = parity(bundle, precision="fp16")
    assert result.passed
    assert (result.stage("layers").state, result.stage("layers").detail) == (
        "not run",
        "the bundle has no layer goldens",
    )


def test_damaged_layer_goldens_are_refused(bundle_copy: Path) -> None:
    (bundle_copy / INPUTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="does not hold readable layer goldens"):
        parity(rehash(bundle_copy, INPUTS), precision="fp32")
    with pytest.raises(UserError, match="of the bundle's checkpoint"):
        load_tables(bundle_copy / outputs_file("fp16"), "0" * 64)


def test_sampled_rows_hold_all_channels() -> None:
    array = np.arange(100 * 40_000, dtype=np.float32).reshape(100, 40_000)
    rows = sample_rows(array)
    assert rows.shape == (4, 40_000)
    assert np.array_equal(rows[[0, -1]], array[[0, -1]])
    assert np.array_equal(sample_rows(array[:3, :7]), array[:3, :7])
