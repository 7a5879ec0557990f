"""Exports that are interrupted, or fail, within a stage: they go on there, and need the disk of the rest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from calibration.statistics import STATISTICS_FILE
from dsvl_export import export, parity
from dsvl_export.compilers.onnx import writer
from dsvl_export.compilers.onnx.builder import Initializer
from dsvl_export.exporter.stages import ExportProgress
from dsvl_export.parity_check import quantization_error, stage_tensors
from dsvl_export.quantization.calibrate import SAMPLES
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens import recording
from runtimes.goldens.golden import greedy_decode


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
        self.error: type[BaseException] = KeyboardInterrupt
        self.stop_when_hashed = False
        self._stage, self._plain = "", writer.stored_bytes
        patch.setattr("dsvl_export.compilers.onnxruntime.EXTERNAL_ABOVE", 0)
        patch.setattr(writer, "stored_bytes", self._bytes)

    def export(self, folder: Path) -> Bundle:
        return export("tiny", folder, precisions=["8da4w"], goldens=False, report=self._follow)

    def _follow(self, progress: ExportProgress) -> None:
        self._stage = progress.stage
        hashing = progress.in_bytes and progress.state == "running" and 2 * progress.done > progress.total
        if hashing and self.stop_when_hashed and self._stage.endswith("/decoder"):
            raise KeyboardInterrupt

    def _bytes(self, item: Initializer) -> memoryview:
        if self._stage.endswith("/decoder") and item.nbytes > writer.INLINE_UP_TO:
            if len(self.names) == self.most:
                raise self.error
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
    assert {file.name for file in (tmp_path / ".staging").iterdir()} == {"stages.json"}


@pytest.mark.parametrize("error", [OSError, MemoryError, SafetensorError, UserError])
def test_what_can_be_mended_loses_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Bundle, list[str]],
    error: type[Exception],
) -> None:
    """A full disk, memory that another process had, a share that was away (as readers and files say it)."""
    bundle, names = whole
    computed = Computed(monkeypatch)
    computed.most, computed.error = len(names) - 3, error
    with pytest.raises(
        UserError, match=None if error is UserError else "run the same command again; the export resumes"
    ):
        computed.export(tmp_path)
    computed.most = None
    assert computed.export(tmp_path).manifest.files == bundle.manifest.files
    assert computed.names == names


def test_an_interruption_while_files_are_hashed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Bundle, list[str]]
) -> None:
    bundle, names = whole
    computed = Computed(monkeypatch)
    computed.stop_when_hashed = True
    with pytest.raises(KeyboardInterrupt):
        computed.export(tmp_path)
    computed.stop_when_hashed = False
    assert computed.export(tmp_path).manifest.files == bundle.manifest.files
    assert computed.names == names


def test_the_disk_is_asked_for_the_rest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was interrupted; where that was of another precision, it is given up first."""

    def free(count: int) -> None:
        usage = SimpleNamespace(free=count)
        monkeypatch.setattr("dsvl_export.exporter.stages.shutil.disk_usage", lambda folder: usage)

    computed = Computed(monkeypatch)
    computed.most = 10
    with pytest.raises(KeyboardInterrupt):
        computed.export(tmp_path / "b")
    (data,) = (tmp_path / "b/.staging").rglob("*.data")
    written = data.stat().st_size
    shutil.copytree(tmp_path / "b", tmp_path / "other")
    free(0)
    with pytest.raises(UserError, match=r"takes .* 0 B are free there") as refused:
        computed.export(tmp_path / "b")
    assert data.stat().st_size == written
    figure = re.search(r"takes ([\d.]+) MB", str(refused.value))
    assert figure
    with pytest.raises(UserError, match="0 B are free there"):
        export("tiny", tmp_path / "other", precisions=["int4"], goldens=False)
    assert not list((tmp_path / "other/.staging").rglob("*.data"))
    free(1 << 40)
    computed.most = None
    made = computed.export(tmp_path / "b")
    artifact = made.artifact("decoder", "onnxruntime", "8da4w")
    decoder = sum(made.manifest.files[file].bytes for file in artifact.files)
    assert float(figure[1]) * 1e6 == pytest.approx(decoder - written, rel=0.1)  # tensors begin at pages


def test_what_other_inputs_make_anew_needs_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old files of a stage stay until the new ones are there, and then go."""
    bundle = export("tiny", tmp_path, goldens=False)
    largest = max(entry.bytes for entry in bundle.manifest.files.values())
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr("dsvl_export.exporter.stages.shutil.disk_usage", lambda folder: usage)
    export("tiny", tmp_path, goldens=False)
    monkeypatch.setattr("dsvl_export.exporter.job.__version__", "0.0.1")
    with pytest.raises(UserError, match="0 B are free there") as refused:
        export("tiny", tmp_path, goldens=False)
    figure = re.search(r"takes ([\d.]+) MB", str(refused.value))
    assert figure and float(figure[1]) * 1e6 == pytest.approx(largest, rel=0.03)
    assert bundle.problems() == []


def test_halves_of_other_inputs_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release cannot go on with them, so they go before the disk is asked."""
    computed = Computed(monkeypatch)
    computed.most = 10
    with pytest.raises(KeyboardInterrupt):
        computed.export(tmp_path)
    assert list((tmp_path / ".staging").rglob("*.data"))
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr("dsvl_export.exporter.stages.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr("dsvl_export.exporter.job.__version__", "0.0.1")
    with pytest.raises(UserError, match="0 B are free there"):
        computed.export(tmp_path)
    assert not list((tmp_path / ".staging").rglob("*.data"))


def test_goldens_go_on_at_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request per group: those that are recorded are not computed again, and progress never falls."""
    decoded: list[int] = []
    plain = greedy_decode

    def greedy(*arguments: Any) -> Any:
        if len(decoded) == 4:
            raise KeyboardInterrupt
        decoded.append(len(arguments[1]))
        return plain(*arguments)

    steps: list[tuple[int, int]] = []

    def follow(progress: ExportProgress) -> None:
        if progress.stage == "goldens" and not progress.in_bytes:
            steps.append((progress.done, progress.total))

    monkeypatch.setattr(recording, "CACHE_BYTES", 1)
    monkeypatch.setattr(recording, "greedy_decode", greedy)
    with pytest.raises(KeyboardInterrupt):
        export("tiny", tmp_path / "b")
    spoiled, stray, *_ = sorted((tmp_path / "b/.staging/goldens").glob("*.safetensors"))
    spoiled.write_bytes(spoiled.read_bytes()[:-400] + bytes(400))  # zeros, as a power cut leaves them
    stray.rename(stray.with_name("99.safetensors"))
    Path(f"{stray}.journal").rename(stray.with_name("99.safetensors.journal"))
    monkeypatch.setattr(recording, "greedy_decode", lambda *arguments: decoded.append(1) or plain(*arguments))
    bundle = export("tiny", tmp_path / "b", report=follow)
    assert len(decoded) == 10 + 2
    assert (
        len([path for path in bundle.manifest.files if re.fullmatch(r"goldens/\d\d\.safetensors", path)])
        == 10
    )
    shares = [done / total for done, total in steps[1:-1]]
    assert shares == sorted(shares) and shares[-1] == 1
    assert parity(bundle).passed


def test_calibration_inside_an_export_goes_on(tmp_path: Path) -> None:
    """Samples that were seen before the interruption are not run again; nothing of it stays in the bundle."""
    seen: list[int] = []

    def until(stop: int) -> Callable[[ExportProgress], None]:
        def follow(progress: ExportProgress) -> None:
            if progress.stage == "precisions/int8" and progress.total == SAMPLES:
                seen.append(progress.done)
                if progress.done == stop:
                    raise KeyboardInterrupt

        return follow

    def interrupted(stop: int) -> int:
        """The samples that were known when it began."""
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            export("tiny", tmp_path / "b", precisions=["int8"], goldens=False, report=until(stop))
        return seen[0]

    interrupted(SAMPLES // 2)
    (statistics,) = (tmp_path / "b/.staging").rglob(STATISTICS_FILE)
    kept = statistics.read_bytes()
    statistics.write_bytes(kept[:1000])  # as a power cut tears it: all begins again
    assert interrupted(8) < 8
    statistics.write_bytes(kept)
    seen.clear()
    export("tiny", tmp_path / "b", precisions=["int8"], goldens=False, report=until(-1))
    assert SAMPLES // 4 <= seen[0] <= SAMPLES // 2
    assert {file.name for file in (tmp_path / "b/.staging").iterdir()} == {"stages.json"}


def test_the_quantization_error_resumes_at_the_golden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    plain = stage_tensors.vision_tensors

    def vision_tensors(*arguments: Any) -> Any:
        measured.append(1)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return plain(*arguments)

    whole = export("tiny", tmp_path / "whole", precisions=["fp16"])
    monkeypatch.setattr(quantization_error, "vision_tensors", vision_tensors)
    with pytest.raises(KeyboardInterrupt):
        export("tiny", tmp_path / "b", precisions=["fp16"])
    (journal,) = (tmp_path / "b/.staging").rglob("*.journal")
    journal.write_text(journal.read_text()[:-9])  # half of the fourth line
    made = export("tiny", tmp_path / "b", precisions=["fp16"])
    assert len(measured) == 5 + 7
    name = "quantization_error/fp16/quantization_error.json"
    assert (made.folder / name).read_text() == (whole.folder / name).read_text()
    assert not any("journal" in path for path in made.manifest.files)
