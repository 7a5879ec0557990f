"""Localization: a fault in a single layer of an exported artifact is found, and the right layer is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsvl_export.parity_check import parity
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.parity_check.faults import (
    TINY_FAULTS,
    Fault,
    plant,
    scaled,
    swapped_halves,
    weight,
    zeroed,
)


def located(bundle: Bundle, precision: str, fault: Fault) -> None:
    result = parity(bundle, precision=precision)
    assert result.verdict == "failed"
    assert [localization.component for localization in result.localizations] == [fault.component]
    assert result.localizations[0].first == fault.tap, str(result.localizations[0])
    assert fault.tap in str(result.localizations[0])
    assert not [path for path in bundle.folder.iterdir() if path.name.startswith(".debug")]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", TINY_FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_every_planted_fault_is_located(bundle_copy: Path, fault: Fault, precision: str) -> None:
    located(plant(bundle_copy, precision, fault.component, fault.edit), precision, fault)


RANDOM_FAULTS = [
    Fault("zeroed row", "decoder", "layers.1", weight("layers.1.mlp.up_proj.weight_transposed", zeroed(3))),
    Fault("swapped RoPE halves", "decoder", "layers.2",
          weight("layers.2.self_attn.k_proj.weight_transposed", swapped_halves(16))),
    Fault("twice", "vision_encoder", "low.blocks.1", weight("low.blocks.1.norm2.weight", scaled(2))),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_random_checkpoints_pass_with_taps_within_their_bounds(random_bundle: Bundle, precision: str) -> None:
    result = parity(random_bundle, precision=precision, taps=True)
    assert (result.verdict, result.goldens) == ("passed", 10)
    assert result.stage("layers").state == "passed"
    assert [localization.component for localization in result.localizations] == [
        "vision_encoder",
        "adaptor",
        "decoder",
    ]
    for localization in result.localizations:
        assert localization.first is None
        assert localization.taps
        assert "lie within their bounds" in str(localization)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", RANDOM_FAULTS, ids=lambda fault: fault.tap)
def test_faults_in_random_checkpoints_are_located(
    random_bundle: Bundle, tmp_path: Path, fault: Fault, precision: str
) -> None:
    copy = Path(shutil.copytree(random_bundle.folder, tmp_path / "bundle"))
    located(plant(copy, precision, fault.component, fault.edit), precision, fault)
