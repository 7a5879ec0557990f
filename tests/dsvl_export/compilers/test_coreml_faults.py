"""Faults planted into saved Core ML packages: the parity check or the audit finds each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsvl_export.audit import audit
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from tests.dsvl_export.compilers.coreml_bundles import copy_with_goldens, export_all_precisions
from tests.dsvl_export.compilers.package_faults import (
    FAULTS,
    FUNCTION_FAULTS,
    Edit,
    PackageFault,
    plant,
    weight,
)
from tests.dsvl_export.parity_check.faults import rehash
from tests.shared import shared_bundle

pytest.importorskip("coremltools", reason="coremltools is not installed here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in every precision that Core ML has; tests must not change it."""
    yield from shared_bundle(tmp_path_factory, "coreml", export_all_precisions)


@pytest.fixture
def shortest(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy to spoil, with one golden, which shows every fault here."""
    return copy_with_goldens(bundle, tmp_path / "bundle", 1)


HIDDEN = [fault for fault in FAULTS if fault.hidden]
SEEN = [fault for fault in FAULTS if not fault.hidden]


@pytest.mark.parametrize("fault", HIDDEN, ids=[fault.name for fault in HIDDEN])
def test_planted_faults_within_the_error_of_a_precision_are_named_by_the_audit(
    shortest: Path, fault: PackageFault
) -> None:
    spoiled = plant(shortest, fault.precision, fault.component, fault.edit)
    assert parity(spoiled, "coreml", fault.precision).verdict == "not judged"  # also with all goldens
    result = audit(spoiled, open_checkpoint("tiny"), "coreml", fault.precision)
    assert result.verdict == "failed"
    different = [part.name for part in result.parts if part.differences]
    assert different == [f"coreml/{fault.precision}/{fault.component}"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=pytest.mark.full if place % 2 else ())
        for place, fault in enumerate(SEEN)
    ],
)
def test_planted_faults_are_caught(shortest: Path, fault: PackageFault) -> None:
    spoiled = plant(shortest, fault.precision, fault.component, fault.edit)
    try:
        result = parity(spoiled, "coreml", fault.precision)
    except UserError as error:
        assert ".mlpackage" in str(error) and "is damaged" not in str(error)
    else:
        assert result.verdict == "failed"


def test_a_fault_is_located_in_its_layer(shortest: Path) -> None:
    """Two rows of a projection are swapped; each layer is handed what was recorded."""
    spoiled = plant(shortest, "fp16", "decoder", weight("layers__2__mlp__up_proj__weight", "<f2", swap_rows))
    stage = parity(spoiled, "coreml", "fp16").stage("layers")
    assert stage.state == "failed"
    assert stage.detail.startswith("decoder: layers.2 is wrong on its recorded input")


def swap_rows(values: np.ndarray) -> None:
    values[[3, 17]] = values[[17, 3]]


@pytest.mark.parametrize(("function", "component", "edit", "device"), FUNCTION_FAULTS)
def test_faults_of_functions_that_apps_call_are_caught(
    shortest: Path, function: str, component: str, edit: Edit, device: str | None
) -> None:
    """The function that an app on another device calls, or that takes an image itself."""
    result = parity(plant(shortest, "fp16", component, edit, function), "coreml", "fp16", device=device)
    failed = {stage.name for stage in result.stages if stage.state == "failed"}
    assert failed - {"layers"} == {"entry_points"}  # the function extend is judged by its layers as well
    assert result.stage("entry_points").detail.startswith(f"function {function} of the ")


def test_a_listing_with_other_token_ids_is_caught(shortest: Path) -> None:
    path = "coreml/fp16/listing/DeepSeekVL.swift"
    text = (shortest / path).read_text()
    spec = Bundle.open(shortest).manifest.prompt
    assert f"[{spec.eos_id}].contains" in text
    (shortest / path).write_text(text.replace(f"[{spec.eos_id}].contains", f"[{spec.eos_id + 1}].contains"))
    result = parity(rehash(shortest, path), "coreml", "fp16")
    assert [stage.name for stage in result.stages if stage.state == "failed"] == ["entry_points"]
    assert "of the listing DeepSeekVL.swift is" in result.stage("entry_points").detail


@pytest.mark.parametrize("precision", sorted({fault.precision for fault in FAULTS}))
def test_no_stage_of_the_unspoiled_copy_fails(shortest: Path, precision: str) -> None:
    """What the tests above rest on; without the long golden there is no verdict."""
    result = parity(Bundle.open(shortest), "coreml", precision)
    assert result.verdict == "not judged"
    assert not [stage.name for stage in result.stages if stage.state == "failed"]


def test_there_are_twenty_faults() -> None:
    assert len(FAULTS) >= 20
