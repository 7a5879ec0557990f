"""Calibrate a checkpoint: data through the whole chain, statistics, the scale table."""

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
from reference.session import write_token_embedding
from runtimes.bundle.locks import locked
from runtimes.errors import UserError

SAMPLES = 64  # of an export that is given no scales
METHOD = "mse"
LOCK = ".lock"
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """What ``calibrate`` does.

    ``part`` (index from 1, count) takes every sample of one part of the data, for several machines;
    ``tune`` is the precision plan that smoothing and GPTQ shall serve.
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
        """Raise UserError where a value makes no sense."""
        index, count = self.part
        if self.method not in METHODS:
            raise UserError(f"There is no method {self.method!r}; there are {', '.join(METHODS)}.")
        if not 1 <= index <= count:
            raise UserError(f"There is no part {index} of {count}.")
        if self.tune and not self.rows and (self.smooth or self.gptq):
            raise UserError("Tuning needs rows of the activations; give --rows above 0.")
        if not 0 < self.percentile <= 100:
            raise UserError(f"The percentile must lie between 0 and 100, got {self.percentile:g}.")


@dataclass(frozen=True)
class Calibrated:
    """A scale table that was written, and the images that were left out."""

    table: ScaleTable
    skipped: tuple[str, ...] = ()


def calibrate(
    source: Checkpoint,
    output: Path,
    options: CalibrationOptions,
    merge: Sequence[Path] = (),
    on_step: OnStep = lambda name, done, total: None,
    spread: Spread | None = None,
) -> Calibrated:
    """Write ``scales.json`` and ``scales.safetensors`` into ``output``, beside the statistics they rest on.

    An interrupted call goes on where it stopped when it is made again.

    Args:
        merge: folders of statistics that make up the whole; the data is not run then.
        spread: runs parts of the data on other machines; the result is the same.

    Raises:
        UserError: bad data or options, or statistics of another checkpoint.
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
) -> Calibrated:
    """Do it, while nobody else writes into ``output``."""
    skipped: tuple[str, ...] = ()
    if merge:
        if output.resolve() in [folder.resolve() for folder in merge]:
            raise UserError(f"{output} is one of the parts; give another folder for the whole.")
        statistics = Statistics.load(_statistics_file(merge[0]))
        for folder in merge[1:]:
            statistics.merge(Statistics.load(_statistics_file(folder)))
        statistics.save(output / STATISTICS_FILE)
    else:
        data = load_data(options.data, options.samples, options.seed)
        index, count = options.part
        samples, skipped = data.samples[index - 1 :: count], data.skipped
        if not samples:
            raise UserError(f"Part {index} of {count} has no samples; give more samples or fewer parts.")
        on_sample = partial(on_step, "calibrating")
        if spread:
            statistics = _collect_spread(source, samples, output, options.rows, on_sample, spread)
        else:
            with token_embedding(source) as embedding:
                statistics = collect_statistics(source, embedding, samples, output, options.rows, on_sample)
    table = build_scale_table(
        source, statistics, options.method, options.percentile, plan, options.smooth, options.gptq, on_step
    )
    table.save(output)
    return Calibrated(table, skipped)


def _collect_spread(
    source: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    keep: int,
    on_sample: Callable[[int, int], None],
    spread: Spread,
) -> Statistics:
    """``collect_statistics`` with groups of samples on other machines, merged as they come."""
    statistics = load_or_create_statistics(source, samples, folder, keep)
    by_digest, known = {sample.digest: sample for sample in samples}, set(statistics.samples)
    missing = [sample for digest, sample in by_digest.items() if digest not in known]
    groups = [missing[start : start + ANSWER_BATCH] for start in range(0, len(missing), ANSWER_BATCH)]
    on_sample(len(statistics.samples), len(samples))
    parts = [(str(source.folder), source.digest, group, keep) for group in groups]
    for _, found in spread(collect_part, parts):
        statistics.merge(found)
        statistics.save(folder / STATISTICS_FILE)
        on_sample(len(statistics.samples), len(samples))
    statistics.samples = list(by_digest)
    statistics.save(folder / STATISTICS_FILE)
    return statistics


def collect_part(folder: str, digest: str, samples: Sequence[Sample], keep: int) -> Statistics:
    """Statistics of some samples, on the machine that this runs on."""
    source, embedding = checkpoint_here(folder, digest)
    with tempfile.TemporaryDirectory() as scratch:
        return collect_statistics(source, embedding, samples, Path(scratch), keep)


@cache
def checkpoint_here(folder: str, digest: str) -> tuple[Checkpoint, Path]:
    """A checkpoint and its token table on this machine, kept for the parts that follow.

    Raises:
        UserError: it is missing here, or another one.
    """
    source = open_checkpoint(folder)
    if source.digest != digest:
        raise UserError(f"{folder} on one of the machines is another checkpoint than here.")
    return source, _KEPT.enter_context(token_embedding(source))


@contextmanager
def token_embedding(source: Checkpoint) -> Iterator[Path]:
    """The checkpoint's token table as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "token_embedding.safetensors"
        write_token_embedding(source, file)
        yield file


_KEPT = ExitStack()  # token tables, for as long as the process lives


def _statistics_file(folder: Path) -> Path:
    return folder / STATISTICS_FILE if folder.is_dir() else folder
