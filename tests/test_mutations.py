"""Some mutations of each kind of file that strangers give; ``benchmarks/robustness`` runs 20,000."""

from __future__ import annotations

import pytest

from benchmarks.robustness.mutations import Kind, kinds, run
from runtimes.bundle.bundle import Bundle

EACH = 60
NAMES = (
    "manifest", "config", "safetensors header", "processor config", "tokenizer", "plan", "scale table", "golden",
)  # fmt: skip


@pytest.fixture(scope="module")
def known(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tiny_bundle.folder, tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused(name: str, known: dict[str, Kind]) -> None:
    assert known.keys() == set(NAMES)
    assert known[name].read(known[name].content) is not None
    found = run(known[name], name, range(EACH))
    assert found.failures == []
    assert found.counts["refused"] > EACH / 3 and found.counts["read"] > 0
