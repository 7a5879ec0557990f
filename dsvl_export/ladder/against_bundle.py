"""Compare two bundles: the first takes the reference's place on the same ladder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsvl_export.ladder.against_reference import OnStep, execution, silent
from dsvl_export.ladder.climb import climb
from dsvl_export.ladder.drift import debug_folder, locate, suspects, tapped_chain
from dsvl_export.ladder.noise import read_noise
from dsvl_export.ladder.result import ParityResult
from dsvl_export.ladder.stages import Goldens
from dsvl_export.ladder.task import counted, judge_task
from dsvl_export.ladder.tolerances import Tolerance, load_tolerances
from runtimes.bundle import Bundle
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from runtimes.recording import GoldenRequest, record_goldens
from runtimes.taps import TAPPED_COMPONENTS
from runtimes.task import TaskItem

Pair = tuple[str, str]  # backend, precision


def compare(
    first: Bundle,
    second: Bundle,
    first_pair: Pair,
    second_pair: Pair,
    *,
    task: list[TaskItem] | None = None,
    taps: bool = False,
    tolerances: dict[str, Tolerance] | None = None,
    threads: int | None = None,
    on_step: OnStep = silent,
) -> ParityResult:
    """How far the second bundle lies from the first, on the first one's golden requests.

    The bounds are the sum of both precisions': each may be off by its own.

    Args:
        first_pair, second_pair: backend and precision of either; they may be of one bundle.
        task, taps, tolerances, threads, on_step: as in ``parity``; the first answers for fp32.

    Raises:
        UserError: one cannot be opened, the first has no goldens, or they are of different models.
    """
    _check_comparable(first, second)
    name = f"{first.folder} {' '.join(first_pair)}"
    runs = [execution(first, *first_pair), execution(second, *second_pair)]
    unable = [run for run in runs if not run.judgeable]
    result = ParityResult(*second_pair, unable[0] if unable else runs[1], name)
    table = tolerances or load_tolerances()
    bounds = [table.get(precision) for _, precision in (first_pair, second_pair)]
    if bounds[0] is None or bounds[1] is None:
        raise UserError(f"There is no tolerance for {first_pair[1]} or {second_pair[1]}; give --tolerances.")
    result.tolerance = bounds[0].plus(bounds[1])
    if unable:
        return result
    one = Pipeline.open(first, *first_pair, threads=threads)
    other = Pipeline.open(second, *second_pair, threads=threads)
    with tempfile.TemporaryDirectory() as temporary, debug_folder(first) as debug:
        goldens = Goldens.of_bundle(first)
        checkpoint = first.manifest.checkpoint["sha256"]
        recorded = [goldens.load(index, checkpoint) for index in range(len(goldens.files))]
        requests = [
            GoldenRequest(golden.prompt, tuple(goldens.folder / "images" / image for image in golden.images))
            for golden in recorded
        ]
        tapped = tapped_chain(first, one.chain, *first_pair, list(TAPPED_COMPONENTS), Path(debug))
        folder = Path(temporary) / "goldens"
        record_goldens(
            one.chain, requests, folder, checkpoint, int(first.manifest.model["decoder"]["max_positions"]),
            lambda done, total: on_step(f"goldens of {name}", done, total), tapped,
        )  # fmt: skip
        made = Goldens.recorded_into(folder)
        noise = read_noise(first, first_pair[1]).plus(read_noise(second, second_pair[1]))
        climb(other.chain, made, checkpoint, result, noise, on_step)
        for component in TAPPED_COMPONENTS if taps else suspects(result):
            on_step(f"taps of the {component}", 0, 1)
            golden = made.load(0, checkpoint)
            result.drift.append(locate(second, other.chain, golden, component, result, noise))
    if task:
        baseline = (name, counted(one, task, f"task by {name}", on_step))
        judge_task(other, task, result, baseline, on_step)
    return result


def _check_comparable(first: Bundle, second: Bundle) -> None:
    a, b = first.manifest, second.manifest
    for what, one, other in (
        ("model", {**a.model, "layout": ""}, {**b.model, "layout": ""}),
        ("preprocessing", a.preprocessing, b.preprocessing),
        ("prompt format", a.prompt, b.prompt),
    ):
        if one != other:
            raise UserError(f"{first.folder} and {second.folder} cannot be compared: their {what} differs.")
