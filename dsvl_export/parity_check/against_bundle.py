"""The comparison of two bundles: a parity check with the first bundle as the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dsvl_export.parity_check.against_reference import OnStep, silent
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.localization import (
    components_to_localize,
    localize,
    take_from_debug_build,
)
from dsvl_export.parity_check.long_context import LongGoldens, bundled_long_goldens, judge_long_context
from dsvl_export.parity_check.quantization_error import read_quantization_error
from dsvl_export.parity_check.result import Localization, ParityResult
from dsvl_export.parity_check.run_stages import run_stages
from dsvl_export.parity_check.task import judge_task, score_with_progress
from dsvl_export.parity_check.text import bundled_texts, judge_text
from dsvl_export.parity_check.tolerances import (
    Tolerance,
    are_overridden,
    component_tolerances,
    load_tolerances,
)
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.mixes import Pair, device_of
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.execution import execution, weakest
from runtimes.goldens.golden import load_golden, save_golden
from runtimes.goldens.long_context import record_long_golden
from runtimes.goldens.recording import GoldenRequest, record_goldens
from runtimes.goldens.taps import TAPPED_COMPONENTS
from runtimes.goldens.task import TaskItem
from runtimes.goldens.texts import rerecord_texts
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions


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
    """Compare the second bundle with the first, on the golden requests of the first.

    The bounds are the sum of the bounds of both precisions.

    Args:
        first: the bundle that takes the place of the reference.
        second: the bundle that is judged; it may be the first one, with another pair.
        first_pair: backend and precision of the first bundle.
        second_pair: backend and precision of the second bundle.
        task: as in ``parity``; the first bundle takes the place of fp32.
        taps: as in ``parity``.
        tolerances: as in ``parity``.
        threads: as in ``parity``.
        on_step: as in ``parity``.

    Returns:
        The stages and the verdict.

    Raises:
        UserError: a bundle cannot be opened, the first has no goldens, or the models differ.
    """
    _check_comparable(first, second)
    if first.folder.resolve() == second.folder.resolve() and first_pair == second_pair:
        raise UserError(
            f"{first.folder} {' '.join(first_pair)} would be compared with itself; pass another"
            " backend or precision."
        )
    name = f"{first.folder} {' '.join(first_pair)}"
    runs = [execution(first, *first_pair), execution(second, *second_pair)]
    run = weakest(runs)
    result = ParityResult(*second_pair, run, name)
    shipped = load_tolerances()
    sides = ((first, first_pair), (second, second_pair))
    rows = [component_tolerances(tolerances or shipped, bundle, *pair) for bundle, pair in sides]
    result.tolerances = {component: row.plus(rows[1][component]) for component, row in rows[0].items()}
    result.overridden = are_overridden([row for side in rows for row in side.values()], shipped)
    if not run.runnable:
        return result
    first_pipeline = Pipeline.open(first, *first_pair, threads=threads, device=runs[0].device)
    checkpoint = first.manifest.checkpoint["sha256"]
    second_pipeline = Pipeline.open(second, *second_pair, threads=threads, device=runs[1].device)
    bundled = Goldens.of_bundle(first)
    recorded = bundled.within(first_pipeline.max_capacity).within(second_pipeline.max_capacity)
    result.left_out = len(bundled.files) - len(recorded.files)
    loaded = [recorded.load(index, checkpoint) for index in range(len(recorded.files))]
    with tempfile.TemporaryDirectory() as temporary:
        requests = [GoldenRequest(golden.prompt, tuple(recorded.images(golden))) for golden in loaded]
        positions = int(first.manifest.model["decoder"]["max_positions"])
        folder = Path(temporary) / "goldens"
        on_golden = partial(on_step, f"goldens of {name}")
        record_goldens(first_pipeline.chain, requests, folder, checkpoint, positions, on_golden)
        goldens = replace(Goldens.recorded_into(folder), numbers=recorded.numbers)
        baseline = None
        if task:
            score = score_with_progress(first_pipeline, task, f"task by {name}", on_step)
            baseline = (name, score)
        errors = [read_quantization_error(bundle, precision) for bundle, (_, precision) in sides]
        quantization_error = errors[0].plus(errors[1])
        texts = bundled_texts(first)
        texts = rerecord_texts(texts, first_pipeline.chain.tokenizer) if texts else None
        judge_text(second_pipeline.chain.tokenizer, texts, result)
        run_stages(second_pipeline.chain, goldens, checkpoint, result, quantization_error, on_step)
        pipelines = (first_pipeline, second_pipeline)
        bounds = [row["decoder"].long_bound for row in rows]
        _compare_long_context(sides, pipelines, checkpoint, bounds, result)
        if task:
            judge_task(score_with_progress(second_pipeline, task, "task", on_step), result, baseline)
        for component in TAPPED_COMPONENTS if taps else components_to_localize(result):
            on_step(f"taps of the {component}", 0, 1)
            options = [SessionOptions(threads, device_of(run.device, component)) for run in runs]
            note = _tap_first(first, first_pipeline.chain, goldens, component, first_pair, options[0])
            localization = Localization(component, (), None, note)
            if not note:
                localization = localize(
                    second, second_pipeline.chain, goldens, checkpoint, component, result,
                    quantization_error, options[1],
                )  # fmt: skip
            result.localizations.append(localization)
    return result


def _compare_long_context(
    sides: Sequence[tuple[Bundle, Pair]],
    pipelines: Sequence[Pipeline],
    checkpoint: str,
    long_bounds: Sequence[Callable[[float], float]],
    result: ParityResult,
) -> None:
    """Judge the stage ``long_context``, with what the first bundle computes as the reference."""
    decoders = [(bundle, bundle.artifact("decoder", *pair).precision) for bundle, pair in sides]
    recorded = [bundled_long_goldens(*decoder) for decoder in decoders]
    if recorded[0] is None:
        judge_long_context(pipelines[1].chain, None, None, 0, lambda error: 0.0, result)
        return
    lengths = [pipeline.max_capacity for pipeline in pipelines if pipeline.max_capacity]
    golden = recorded[0].exact.truncate(min(lengths, default=None))
    bounds = []
    for bound, long in zip(long_bounds, recorded, strict=True):
        error = float(np.max((long or recorded[0]).errors()))
        bounds.append(bound(error) + error)
    capacity = golden.capacity
    first = record_long_golden(pipelines[0].chain, golden.tokens, checkpoint, capacity)
    goldens = LongGoldens(first, first)
    judge_long_context(pipelines[1].chain, goldens, None, capacity, lambda error: sum(bounds), result)


def _tap_first(
    first: Bundle, chain: Chain, goldens: Goldens, component: str, pair: Pair, options: SessionOptions
) -> str:
    """Add the first bundle's taps of a component to its first golden.

    Return why if that is impossible.
    """
    file = goldens.files[0]
    golden = load_golden(file)
    try:
        taps = take_from_debug_build(first, chain, golden, component, pair, options)
    except (UserError, OSError) as error:
        return f"no debug build of {first.folder}: {str(error).rstrip('.')}"
    save_golden(replace(golden, taps={**golden.taps, component: taps}), file)
    return ""


def _check_comparable(first: Bundle, second: Bundle) -> None:
    """Raise UserError if the bundles are of different models."""
    a, b = first.manifest, second.manifest
    differs = {
        "model": {**a.model, "layout": ""} != {**b.model, "layout": ""},
        "preprocessing": a.preprocessing != b.preprocessing,
        "prompt format": a.prompt != b.prompt,
    }
    for name, different in differs.items():
        if different:
            raise UserError(f"{first.folder} and {second.folder} cannot be compared: their {name} differs.")
