"""Compare two bundles: the first takes the reference's place on the same ladder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dsvl_export.parity_check.against_reference import OnStep, execution, silent, weakest
from dsvl_export.parity_check.localization import locate, suspects, take_from_debug_build
from dsvl_export.parity_check.long_context import LongGoldens, bundled_long_goldens, judge_long_context
from dsvl_export.parity_check.quantization_error import read_noise
from dsvl_export.parity_check.result import Drift, ParityResult
from dsvl_export.parity_check.run_stages import climb
from dsvl_export.parity_check.stages import Goldens
from dsvl_export.parity_check.task import counted, judge_task
from dsvl_export.parity_check.text import bundled_texts, judge_text
from dsvl_export.parity_check.tolerances import Tolerance, load_tolerances, tolerance_for, tolerance_of_base
from runtimes.bundle.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import load_golden, save_golden
from runtimes.goldens.long_context import record_long_golden
from runtimes.goldens.recording import GoldenRequest, record_goldens
from runtimes.goldens.taps import TAPPED_COMPONENTS
from runtimes.goldens.task import TaskItem
from runtimes.goldens.texts import rerecord_texts
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions

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
    if first.folder.resolve() == second.folder.resolve() and first_pair == second_pair:
        raise UserError(
            f"{first.folder} {' '.join(first_pair)} would be compared with itself; name another one."
        )
    name = f"{first.folder} {' '.join(first_pair)}"
    runs = [execution(first, *first_pair), execution(second, *second_pair)]
    run = weakest(runs)
    result = ParityResult(*second_pair, run, name)
    shipped = load_tolerances()
    pairs = ((first, first_pair[1]), (second, second_pair[1]))
    bounds = [tolerance_for(tolerances or shipped, *pair) for pair in pairs]
    if bounds[0] is None or bounds[1] is None:
        raise UserError(f"There is no tolerance for {first_pair[1]} or {second_pair[1]}; give --tolerances.")
    result.tolerance = bounds[0].plus(bounds[1])
    result.overridden = bounds != [tolerance_for(shipped, *pair) for pair in pairs]
    if not run.runnable:
        return result
    one = Pipeline.open(first, *first_pair, threads=threads, device=runs[0].device)
    checkpoint = first.manifest.checkpoint["sha256"]
    other = Pipeline.open(second, *second_pair, threads=threads, device=runs[1].device)
    whole = Goldens.of_bundle(first)
    recorded = whole.within(one.max_capacity).within(other.max_capacity)
    result.left_out = len(whole.files) - len(recorded.files)
    loaded = [recorded.load(index, checkpoint) for index in range(len(recorded.files))]
    with tempfile.TemporaryDirectory() as temporary:
        requests = [GoldenRequest(golden.prompt, tuple(recorded.images(golden))) for golden in loaded]
        positions = int(first.manifest.model["decoder"]["max_positions"])
        folder = Path(temporary) / "goldens"
        record_goldens(
            one.chain, requests, folder, checkpoint, positions, partial(on_step, f"goldens of {name}")
        )
        goldens = replace(Goldens.recorded_into(folder), numbers=recorded.numbers)
        baseline = (name, counted(one, task, f"task by {name}", on_step)) if task else None
        noise = read_noise(first, first_pair[1]).plus(read_noise(second, second_pair[1]))
        texts = bundled_texts(first)
        texts = rerecord_texts(texts, one.chain.tokenizer) if texts else None
        judge_text(other.chain.tokenizer, texts, result)
        climb(other.chain, goldens, checkpoint, result, noise, on_step)
        _compare_long_context(pairs, (one, other), checkpoint, tolerances or shipped, result)
        if task:
            judge_task(counted(other, task, "task", on_step), result, baseline)
        options = [SessionOptions(threads, each.device) for each in runs]
        for component in TAPPED_COMPONENTS if taps else suspects(result):
            on_step(f"taps of the {component}", 0, 1)
            note = _tap_first(first, one.chain, goldens, component, first_pair, options[0])
            result.drift.append(
                Drift(component, (), None, note)
                if note
                else locate(second, other.chain, goldens, checkpoint, component, result, noise, options[1])
            )
    return result


def _compare_long_context(
    pairs: Sequence[tuple[Bundle, str]],
    pipelines: Sequence[Pipeline],
    checkpoint: str,
    table: Mapping[str, Tolerance],
    result: ParityResult,
) -> None:
    """What the first one computes for its long golden takes the reference's place."""
    recorded = [bundled_long_goldens(bundle, precision) for bundle, precision in pairs]
    if recorded[0] is None:
        judge_long_context(pipelines[1].chain, None, None, 0, lambda error: 0.0, result)
        return
    lengths = [pipeline.max_capacity for pipeline in pipelines if pipeline.max_capacity]
    golden = recorded[0].exact.truncate(min(lengths, default=None))
    bounds = []
    for (bundle, precision), long in zip(pairs, recorded, strict=True):
        own = tolerance_for(table, bundle, precision)
        assert own
        base, known = tolerance_of_base(table, bundle, precision, own), long or recorded[0]
        error = float(np.max(known.errors()))
        bounds.append(own.long_bound(base, error) + error)
    chain, capacity = pipelines[0].chain, golden.capacity
    first = record_long_golden(chain, golden.tokens, checkpoint, capacity)
    judge_long_context(
        pipelines[1].chain, LongGoldens(first, first), None, capacity, lambda error: sum(bounds), result
    )


def _tap_first(
    first: Bundle, chain: Chain, goldens: Goldens, component: str, pair: Pair, options: SessionOptions
) -> str:
    """Put the first bundle's taps of a component into its first golden; says why where that cannot be."""
    file = goldens.files[0]
    golden = load_golden(file)
    try:
        taps = take_from_debug_build(first, chain, golden, component, pair, options)
    except (UserError, OSError) as error:
        return f"no debug build of {first.folder}: {str(error).rstrip('.')}"
    save_golden(replace(golden, taps={**golden.taps, component: taps}), file)
    return ""


def _check_comparable(first: Bundle, second: Bundle) -> None:
    a, b = first.manifest, second.manifest
    for what, one, other in (
        ("model", {**a.model, "layout": ""}, {**b.model, "layout": ""}),
        ("preprocessing", a.preprocessing, b.preprocessing),
        ("prompt format", a.prompt, b.prompt),
    ):
        if one != other:
            raise UserError(f"{first.folder} and {second.folder} cannot be compared: their {what} differs.")
