"""The stage ``long_context``: a text that fills the KV cache, judged at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsvl_export.parity_check.metrics import CHANNEL_FACTOR, channel_error, channel_errors
from dsvl_export.parity_check.result import ParityResult, StageResult
from runtimes.bundle.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.long_context import (
    LONG_GOLDEN,
    LongGolden,
    decode_rows_again,
    normalize_keys,
    prefill_text,
    project_keys,
)

STAGE = "long_context"
LONG = -1  # the number of the long golden in results
MISSING = "the bundle was written by an earlier release and has no long golden; export it again"


@dataclass(frozen=True)
class LongGoldens:
    """The long golden of the precision plan, which an artifact must match, and that of fp32.

    Both are the same if nothing was recorded for the precision.
    """

    exact: LongGolden
    planned: LongGolden

    def truncate(self, length: int | None) -> LongGoldens:
        """Return the start of both that a KV cache of ``length`` tokens holds; None is no limit."""
        return LongGoldens(self.exact.truncate(length), self.planned.truncate(length))

    def errors(self) -> list[float]:
        """Return the plan's relative RMS errors from fp32: logits first, then each layer's keys."""
        keys = (normalize_keys(golden.keys) for golden in (self.planned, self.exact))
        layers = map(relative_rms, *keys)
        return [relative_rms(self.planned.logits, self.exact.logits), *layers]


def planned_file(precision: str) -> str:
    """Return the path in a bundle of what a precision plan computes for the long golden."""
    return f"long/{precision}/{LONG_GOLDEN}"


def bundled_long_goldens(bundle: Bundle, precision: str) -> LongGoldens | None:
    """Load the long goldens of a bundle and check their hashes; return None if it has none.

    Raises:
        UserError: they are damaged, or were recorded from another checkpoint.
    """
    exact, planned = f"goldens/{LONG_GOLDEN}", planned_file(precision)
    if exact not in bundle.manifest.files:
        return None
    if planned not in bundle.manifest.files:
        planned = exact
    bundle.check({exact, planned})
    return load_long_goldens(bundle.path(exact), bundle.path(planned), bundle.manifest.checkpoint["sha256"])


def load_long_goldens(exact: Path, planned: Path, checkpoint: str) -> LongGoldens:
    """Load two long goldens of one text.

    Raises:
        UserError: they are of other texts, or were recorded from another checkpoint.
    """
    goldens = LongGoldens(LongGolden.load(exact), LongGolden.load(planned))
    for file, golden in ((exact, goldens.exact), (planned, goldens.planned)):
        if golden.checkpoint != checkpoint:
            raise UserError(
                f"The golden {file} was recorded from the checkpoint {golden.checkpoint[:12]}, not from"
                f" {checkpoint[:12]}; export the bundle again."
            )
        if not np.array_equal(golden.tokens, goldens.exact.tokens):
            raise UserError(f"{file} and {exact} are of different texts; export the bundle again.")
    return goldens


def judge_long_context(
    chain: Chain,
    goldens: LongGoldens | None,
    longest: int | None,
    capacity: int,
    bound: Callable[[float], float],
    result: ParityResult,
) -> None:
    """Fill in the stage ``long_context``.

    Args:
        chain: the components to judge.
        goldens: the long goldens; None if the bundle has none.
        longest: largest number of tokens that the decoder's KV cache can hold; None is no limit.
        capacity: the default capacity in the manifest.
        bound: returns the largest relative RMS error, given the error of the precision plan from
            fp32.
        result: the result to fill in.

    Raises:
        UserError: the long golden does not fit the contracts of the decoder.
    """
    stage = result.stage(STAGE)
    if goldens is None:
        stage.detail = MISSING
        return
    recorded = goldens.exact.capacity
    goldens = goldens.truncate(longest)
    exact, planned = goldens.exact, goldens.planned
    if not len(planned.rows):
        stage.detail = f"a KV cache of {longest} tokens is too short for the first recorded logits"
        return
    _check_fits(planned, chain)
    if capacity != recorded:
        stage.fail(f"the manifest's default_capacity is {capacity}, the goldens were recorded for {recorded}")
    logits, cache = prefill_text(chain, planned.tokens, planned.rows)
    steps = decode_rows_again(chain, planned.tokens, planned.rows, cache)
    keys = [
        normalize_keys(array)
        for array in (project_keys(cache, len(planned.tokens)), planned.keys, exact.keys)
    ]
    positions = np.arange(len(planned.tokens))
    for layer, (actual, wanted, fp32) in enumerate(zip(*keys, strict=True)):
        _compare(stage, f"keys of decoder layer {layer}", actual, wanted, fp32, positions, bound)
    for tensor, actual in (("logits", logits), ("step_logits", steps)):
        _compare(stage, tensor, actual.T, planned.logits.T, exact.logits.T, planned.rows, bound)
    if stage.state == "passed" and len(planned.tokens) < recorded:
        stage.detail = f"judged up to position {len(planned.tokens)} of {recorded}"


def _check_fits(golden: LongGolden, chain: Chain) -> None:
    logits = chain.decoder.contract.outputs[0]
    states = chain.decoder.contract.states
    vocabulary = int(logits.shape[-1])
    fits = (
        golden.logits.shape[1] == vocabulary
        and len(golden.keys) == len(states) // 2
        and 0 <= golden.tokens.min() <= golden.tokens.max() < vocabulary
    )
    if not fits:
        raise UserError("The long golden does not fit the bundle's contracts; export the bundle again.")


def _compare(
    stage: StageResult,
    tensor: str,
    actual: np.ndarray,
    planned: np.ndarray,
    exact: np.ndarray,
    positions: np.ndarray,
    bound: Callable[[float], float],
) -> None:
    """Judge values ``[N, K]`` at ``positions [K]``: all of them, and each position by itself."""
    if actual.shape != planned.shape or exact.shape != planned.shape:
        stage.fail(f"{tensor} of the long golden is {list(actual.shape)}, expected {list(planned.shape)}")
        return
    error, worst = relative_rms(planned, exact), channel_error(planned, exact)
    total_bound = bound(error)
    position_bound = CHANNEL_FACTOR * bound(0) + bound(worst) - bound(0)
    passing = stage.state != "failed"
    stage.compare(LONG, tensor, actual, planned, total_bound, error, position_bound)
    if passing and stage.state == "failed":
        with np.errstate(invalid="ignore", over="ignore"):
            errors, error = channel_errors(actual, planned), relative_rms(actual, planned)
        place = int(np.argmax(errors))  # NaN counts as largest
        position = positions[place]
        if not np.isfinite(actual).all():
            fault = f"NaN or infinity at position {position}"
        elif errors[place] > position_bound:
            fault = f"error {errors[place]:.2g} at position {position}, bound {position_bound:.2g}"
        else:
            fault = f"error {error:.2g}, bound {total_bound:.2g}; largest at position {position}"
        stage.detail = f"{tensor}: {fault}"
