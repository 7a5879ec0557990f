"""Exports that are interrupted within a component go on at the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsvl_export import export
from dsvl_export.exporting import ExportProgress
from dsvl_export.onnx_graph import writer
from dsvl_export.onnx_graph.builder import Initializer
from runtimes.bundle import Bundle


def newest(folder: Path, ending: str) -> Path:
    return max(folder.rglob(f"*{ending}"), key=lambda file: file.stat().st_mtime_ns)


def torn(folder: Path) -> None:
    """As a power cut leaves it: the last tensor is not on the disk as the journal says."""
    data = newest(folder, ".data")
    data.write_bytes(data.read_bytes()[:-100] + bytes(100))


def half_a_line(folder: Path) -> None:
    journal = newest(folder, ".journal")
    journal.write_text(journal.read_text()[:-9])


def rubbish(folder: Path) -> None:
    """Another thing that a power cut leaves: the last line has its length, but not its bytes."""
    journal = newest(folder, ".journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + bytes(len(lines[-1]) - 2) + b"\xff\n")


class Computed:
    """Names of the decoder's tensors beside its graphs, as they are computed, up to an interruption."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.most: int | None = None
        self._stage, self._plain = "", writer._bytes
        patch.setattr(writer.write_model, "__defaults__", (0, None))
        patch.setattr(writer, "_bytes", self._bytes)

    def export(self, folder: Path) -> Bundle:
        return export("tiny", folder, precisions=["8da4w"], goldens=False, report=self._follow)

    def _follow(self, progress: ExportProgress) -> None:
        self._stage = progress.stage

    def _bytes(self, item: Initializer) -> bytes:
        if self._stage.endswith("/decoder") and item.nbytes > writer.INLINE_UP_TO:
            if len(self.names) == self.most:
                raise KeyboardInterrupt
            self.names.append(item.name)
        return self._plain(item)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """An export of two graphs that share their weights, and the order in which these are computed."""
    with pytest.MonkeyPatch.context() as patch:
        computed = Computed(patch)
        return computed.export(tmp_path_factory.mktemp("whole") / "b"), computed.names


@pytest.mark.parametrize(
    ("left", "spoil", "again"),
    [(-12, None, 0), (-1, None, 0), (-12, torn, 1), (-12, half_a_line, 1), (-12, rubbish, 1)],
)
def test_an_export_goes_on_within_a_component(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Bundle, list[str]],
    left: int,
    spoil: Callable[[Path], None] | None,
    again: int,
) -> None:
    """No tensor that is written is computed again, also not by the second graph; the bundle is the same."""
    bundle, names = whole
    computed = Computed(monkeypatch)
    computed.most = len(names) + left
    with pytest.raises(KeyboardInterrupt):
        computed.export(tmp_path)
    computed.most = None
    if spoil:
        spoil(tmp_path / ".staging")
    made = computed.export(tmp_path)
    assert computed.names == [*names[:left], *names[left - again :]]
    assert not [*tmp_path.rglob("*.journal"), *tmp_path.rglob(".inputs")]
    assert made.manifest.files == bundle.manifest.files


def test_what_was_interrupted_goes_with_the_next_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes of another precision do not stay hidden in a bundle."""
    computed = Computed(monkeypatch)
    computed.most = 3
    with pytest.raises(KeyboardInterrupt):
        computed.export(tmp_path)
    computed.most = None
    assert list((tmp_path / ".staging").rglob("*.data"))
    export("tiny", tmp_path, goldens=False)
    assert {file.name for file in (tmp_path / ".staging").iterdir()} == {"stages.json", "lock"}
