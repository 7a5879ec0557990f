"""Stages of an export, and the loop that plans, sizes, resumes and runs them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from dsvl_export.exporter.staging import Staging
from runtimes.errors import PrecisionOverflowError, UserError
from runtimes.units import size as size_of

GOLDENS = "goldens"
TOKEN_EMBEDDING_STAGE = "token_embedding"
CALIBRATION = "calibration"  # the scratch folder of an export that calibrates
KEPT = (CALIBRATION, GOLDENS, TOKEN_EMBEDDING_STAGE)  # interrupted work that every later export can resume


@dataclass(frozen=True)
class ExportProgress:
    """What an export reports: the stage and how far it is, in bytes or in steps of the stage."""

    stage: str
    done: int = 0
    total: int = 1
    state: Literal["running", "finished", "reused"] = "running"
    in_bytes: bool = False


Report = Callable[[ExportProgress], None]


class StageProgress:
    """Reports the progress of one stage.

    Bytes are counted twice: as they are written, and as they are hashed.
    """

    def __init__(self, name: str, report: Report) -> None:
        """Report to ``report`` under the stage's name."""
        self._name, self._report = name, report
        self._written = 0

    def step(self, done: int, total: int) -> None:
        """Report finished steps."""
        self._report(ExportProgress(self._name, done, total))

    def write(self, count: int, total: int) -> None:
        """Report ``count`` more bytes of ``total`` that the stage writes."""
        self._written = min(self._written + count, total)
        self._report(ExportProgress(self._name, self._written, max(2 * total, 1), in_bytes=True))

    def hash(self, done: int, total: int) -> None:
        """Report hashed bytes."""
        progress = ExportProgress(
            self._name, self._written + done, max(self._written + total, 1), in_bytes=True
        )
        self._report(progress)


@dataclass(frozen=True)
class Stage:
    """One step of an export.

    Args:
        name: the folder of its files in the bundle; it names the stage in progress reports as well.
        inputs: returns everything that the files depend on, as JSON values; None if an earlier
            stage has to run first.
        build: writes the files into a folder, and returns what the manifest needs to know of them.
        bytes: returns the size of the files, from shapes alone; None for files of at most some
            megabytes, which are not planned.
        scratch: returns the size of further files that are there while the files are written.
        extends: name of a finished stage that the one file of this stage is added to; its inputs
            are kept in that stage's result.
        optional_for: a precision of an earlier export. If it overflows, the stage and the later
            stages of the same precision are left out, and the export continues.
    """

    name: str
    inputs: Callable[[], dict[str, Any] | None]
    build: Callable[[Path, StageProgress], dict[str, Any]]
    bytes: Callable[[], int] | None = None
    scratch: Callable[[], int] | None = None
    extends: str | None = None
    optional_for: str | None = None


class StageRunner:
    """Plans, sizes, resumes and runs the stages of one export in their order."""

    def __init__(self, staging: Staging, report: Report) -> None:
        """Run stages in an output folder that is open."""
        self._staging, self._report = staging, report

    def is_current(self, stage: Stage) -> bool:
        """Return whether a stage was finished with its current inputs."""
        inputs = stage.inputs()
        return inputs is not None and self._staging.is_current(stage.name, inputs)

    def make_room(self, stages: Sequence[Stage]) -> None:
        """Check that the disk can hold the export, before any work.

        Interrupted work of other stages is deleted first. Files that are finished, or were written
        before an interruption, are not counted.

        Raises:
            UserError: the disk is too small.
        """
        self._staging.forget_all_but({*KEPT, *(stage.name for stage in stages)})
        needed = written = 0  # old files stay until the new ones are there
        for stage in stages:
            if stage.bytes:
                new, old = self._staging.remaining_bytes(stage.name, stage.inputs, stage.bytes)
                scratch = stage.scratch() if stage.scratch and new else 0
                needed, written = max(needed, written + new + scratch), written + new - old
        free = shutil.disk_usage(self._staging.folder).free
        if needed > free:
            raise UserError(
                f"The export takes {size_of(needed)} in {self._staging.folder},"
                f" but only {size_of(free)} are free there."
            )

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages; those that are current are reused.

        Raises:
            PrecisionOverflowError: a precision of this export computes NaN or infinity.
        """
        overflowed: set[str] = set()
        for stage in stages:
            try:
                if stage.optional_for in overflowed:
                    self._leave_out(stage)
                elif stage.extends:
                    self._extend(stage, stage.extends)
                else:
                    self._run(stage)
            except PrecisionOverflowError:
                if stage.optional_for is None:
                    raise
                overflowed.add(stage.optional_for)
                self._leave_out(stage)

    def _run(self, stage: Stage) -> None:
        self._report(ExportProgress(stage.name))
        progress = StageProgress(stage.name, self._report)
        reused = self._staging.stage(
            stage.name, stage.inputs(), lambda folder: stage.build(folder, progress), progress.hash
        )
        self._report(ExportProgress(stage.name, 1, 1, "reused" if reused else "finished"))

    def _extend(self, stage: Stage, extended: str) -> None:
        """Add a stage's file to a finished stage, unless that has it from the same inputs."""
        inputs, result = stage.inputs() or {}, self._staging.result(extended) or {}
        if result.items() >= inputs.items():
            return
        self._report(ExportProgress(stage.name))
        with TemporaryDirectory(dir=self._staging.work) as folder:
            stage.build(Path(folder), StageProgress(stage.name, self._report))
            (file,) = Path(folder).iterdir()
            self._staging.attach(extended, file, {**result, **inputs})
        self._report(ExportProgress(stage.name, 1, 1, "finished"))

    def _leave_out(self, stage: Stage) -> None:
        """Delete an earlier result that was made from other inputs."""
        if not self.is_current(stage):
            self._staging.forget(stage.name)
        self._report(ExportProgress(stage.name, 1, 1, "finished"))
