"""Calibration of a checkpoint: runs data through all components and writes the scale table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from calibration.choose_scales import build_scale_table
from calibration.data import Sample, load_data
from calibration.precision_plan import PrecisionPlan, load_precision
from calibration.ranges import METHODS, PERCENTILE
from calibration.scale_table import ScaleTable
from calibration.statistics import (
    ANSWER_BATCH,
    KEPT_ROWS,
    STATISTICS_FILE,
    Statistics,
    collect_statistics,
    load_or_create_statistics,
)
from dsvl_export.cluster.ray_cluster import Spread
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.session import write_token_embedding
from runtimes.bundle.locks import locked
from runtimes.errors import UserError

SAMPLES = 64  # for an export without a scale table
METHOD = "mse"
LOCK = ".lock"
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of a calibration.

    ``part`` (index from 1, count) uses one part of the samples, to calibrate on several machines.
    ``tune`` is the precision plan that smoothing and GPTQ optimize for. ``rows`` of activations are
    kept for each layer.
    """

    data: str = "bundled"
    samples: int = 128
    seed: int = 0
    part: tuple[int, int] = (1, 1)
    method: str = METHOD
    percentile: float = PERCENTILE
    rows: int = KEPT_ROWS
    tune: str | None = None
    smooth: bool = True
    gptq: bool = True

    def check(self) -> None:
        """Check the values.

        Raises:
            UserError: a value is invalid.
        """
        index, count = self.part
        if self.method not in METHODS:
            raise UserError(f"There is no method {self.method!r}; use one of {', '.join(METHODS)}.")
        if not 1 <= index <= count:
            raise UserError(f"There is no part {index} of {count}.")
        if self.tune and not self.rows and (self.smooth or self.gptq):
            raise UserError("Tuning needs rows of the activations; pass --rows above 0.")
        if not 0 < self.percentile <= 100:
            raise UserError(f"The percentile must lie between 0 and 100, got {self.percentile:g}.")


@dataclass(frozen=True)
class CalibrationResult:
    """The scale table, and the images that could not be read."""

    table: ScaleTable
    skipped: tuple[str, ...] = ()


def calibrate(
    source: Checkpoint,
    output: Path,
    options: CalibrationOptions,
    merge: Sequence[Path] = (),
    on_step: OnStep = lambda name, done, total: None,
    spread: Spread | None = None,
) -> CalibrationResult:
    """Calibrate a checkpoint; write ``scales.json``, ``scales.safetensors`` and statistics.

    If a call is interrupted, the same call resumes.

    Args:
        source: the checkpoint.
        output: folder for the scale table and the statistics.
        options: data, samples and methods.
        merge: folders with statistics of all parts, which are merged instead of running data.
        on_step: called with the name of the step, the samples done and all samples.
        spread: runs parts of the data on a cluster; the result is the same.

    Raises:
        UserError: the data or the options are invalid, or statistics are of another checkpoint.
    """
    options.check()
    plan = load_precision(options.tune) if options.tune else None
    if plan:
        plan.check(source.config)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / LOCK, f"Another calibration is writing to {output}; wait for it."):
        return _calibrate(source, output, options, merge, on_step, spread, plan)


def _calibrate(
    source: Checkpoint,
    output: Path,
    options: CalibrationOptions,
    merge: Sequence[Path],
    on_step: OnStep,
    spread: Spread | None,
    plan: PrecisionPlan | None,
) -> CalibrationResult:
    """Calibrate; the caller holds the lock of ``output``."""
    skipped: tuple[str, ...] = ()
    if merge:
        if output.resolve() in [folder.resolve() for folder in merge]:
            raise UserError(f"{output} is one of the parts to merge; pass another folder as --output.")
        statistics = Statistics.load(_statistics_file(merge[0]))
        for folder in merge[1:]:
            statistics.merge(Statistics.load(_statistics_file(folder)))
        statistics.save(output / STATISTICS_FILE)
    else:
        data = load_data(options.data, options.samples, options.seed)
        index, count = options.part
        samples, skipped = data.samples[index - 1 :: count], data.skipped
        if not samples:
            raise UserError(f"Part {index} of {count} has no samples; use more samples or fewer parts.")
        on_sample = partial(on_step, "calibrating")
        if spread:
            statistics = _collect_spread(source, samples, output, options.rows, on_sample, spread)
        else:
            with temporary_token_embedding(source) as embedding:
                statistics = collect_statistics(source, embedding, samples, output, options.rows, on_sample)
    table = build_scale_table(
        source, statistics, options.method, options.percentile, plan, options.smooth, options.gptq, on_step
    )
    table.save(output)
    return CalibrationResult(table, skipped)


def _collect_spread(
    source: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    keep: int,
    on_sample: Callable[[int, int], None],
    spread: Spread,
) -> Statistics:
    """Collect statistics of groups of samples on a cluster, and merge them as they finish."""
    statistics = load_or_create_statistics(source, samples, folder, keep)
    by_digest, done = {sample.digest: sample for sample in samples}, set(statistics.samples)
    missing = [sample for digest, sample in by_digest.items() if digest not in done]
    groups = [missing[start : start + ANSWER_BATCH] for start in range(0, len(missing), ANSWER_BATCH)]
    on_sample(len(statistics.samples), len(samples))
    parts = [
        (str(source.folder), source.choices, source.digest, source.built_in_prompt, group, keep)
        for group in groups
    ]
    for _, part in spread(collect_part, parts):
        statistics.merge(part)
        statistics.save(folder / STATISTICS_FILE)
        on_sample(len(statistics.samples), len(samples))
    statistics.samples = list(by_digest)
    statistics.save(folder / STATISTICS_FILE)
    return statistics


def collect_part(
    folder: str,
    adapters: tuple[AdapterChoice, ...],
    digest: str,
    built_in_prompt: bool,
    samples: Sequence[Sample],
    keep: int,
) -> Statistics:
    """Collect statistics of some samples, in a worker of the cluster."""
    source, embedding = open_checkpoint_on_worker(folder, adapters, digest, built_in_prompt)
    with tempfile.TemporaryDirectory() as scratch:
        return collect_statistics(source, embedding, samples, Path(scratch), keep)


@cache
def open_checkpoint_on_worker(
    folder: str, adapters: tuple[AdapterChoice, ...], digest: str, built_in_prompt: bool
) -> tuple[Checkpoint, Path]:
    """Open a checkpoint and write its token table; both are kept for later calls in the worker.

    Raises:
        UserError: the checkpoint is missing on this machine, or is another one.
    """
    source = open_checkpoint(folder, adapters=adapters, built_in_prompt=built_in_prompt)
    if source.digest != digest:
        raise UserError(f"{folder} is another checkpoint on one of the machines; copy the same one to all.")
    return source, _WORKER_FILES.enter_context(temporary_token_embedding(source))


@contextmanager
def temporary_token_embedding(source: Checkpoint) -> Iterator[Path]:
    """Write the checkpoint's token table to a temporary file, and yield the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "token_embedding.safetensors"
        write_token_embedding(source, file)
        yield file


_WORKER_FILES = ExitStack()  # token tables, until the worker ends


def _statistics_file(folder: Path) -> Path:
    return folder / STATISTICS_FILE if folder.is_dir() else folder
