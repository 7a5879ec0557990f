"""The stage ``long_context``: a text that fills the KV cache, every position of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsvl_export.parity_check.metrics import CHANNEL_FACTOR, channel_error, channel_errors
from dsvl_export.parity_check.result import ParityResult, Rung
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
LONG = -1  # as the number of a golden: the long one has none
MISSING = "the bundle is of an earlier release and has no long golden; export it again"


@dataclass(frozen=True)
class LongGoldens:
    """What is expected of an artifact, ``planned``, and what fp32 computes, ``exact``.

    They are the same where nothing else was recorded for the precision.
    """

    exact: LongGolden
    planned: LongGolden

    def truncate(self, length: int | None) -> LongGoldens:
        """The beginning of both that a KV cache of ``length`` tokens holds; None is no limit."""
        return LongGoldens(self.exact.truncate(length), self.planned.truncate(length))

    def errors(self) -> list[float]:
        """Relative RMS errors of the plan from fp32: of the logits, and of each layer's keys."""
        keys = (normalize_keys(each.keys) for each in (self.planned, self.exact))
        layers = map(relative_rms, *keys)
        return [relative_rms(self.planned.logits, self.exact.logits), *layers]


def planned_file(precision: str) -> str:
    """Where a bundle keeps what a precision plan computes for the long golden."""
    return f"long/{precision}/{LONG_GOLDEN}"


def bundled_long_goldens(bundle: Bundle, precision: str) -> LongGoldens | None:
    """The recorded ones, checked against their hashes; None where the bundle has none.

    Raises:
        UserError: they are damaged, or of another checkpoint.
    """
    exact, planned = f"goldens/{LONG_GOLDEN}", planned_file(precision)
    if exact not in bundle.manifest.files:
        return None
    if planned not in bundle.manifest.files:
        planned = exact
    bundle.check({exact, planned})
    return load_long_goldens(bundle.path(exact), bundle.path(planned), bundle.manifest.checkpoint["sha256"])


def load_long_goldens(exact: Path, planned: Path, checkpoint: str) -> LongGoldens:
    """Two long goldens of one text; raises UserError where they do not belong together."""
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
    """Fill the result's stage ``long_context``.

    Args:
        longest: tokens that the decoder's KV cache can hold; None is any number.
        capacity: the default capacity that the manifest states.
        bound: largest relative RMS error, given the error of the precision plan itself.
    """
    rung = result.rung(STAGE)
    if goldens is None:
        rung.detail = MISSING
        return
    recorded = goldens.exact.capacity
    goldens = goldens.truncate(longest)
    exact, planned = goldens.exact, goldens.planned
    if not len(planned.rows):
        rung.detail = f"a KV cache of {longest} tokens ends before the first logits that were recorded"
        return
    _check_fits(planned, chain)
    if capacity != recorded:
        rung.fail(f"the manifest's default_capacity is {capacity}, the goldens were recorded for {recorded}")
    logits, cache = prefill_text(chain, planned.tokens, planned.rows)
    steps = decode_rows_again(chain, planned.tokens, planned.rows, cache)
    keys = [
        normalize_keys(each) for each in (project_keys(cache, len(planned.tokens)), planned.keys, exact.keys)
    ]
    for layer, (found, wanted, fp32) in enumerate(zip(*keys, strict=True)):
        _compare(
            rung, f"keys of decoder layer {layer}", found, wanted, fp32, np.arange(len(planned.tokens)), bound
        )
    for tensor, found in (("logits", logits), ("step_logits", steps)):
        _compare(rung, tensor, found.T, planned.logits.T, exact.logits.T, planned.rows, bound)
    if rung.state == "passed" and len(planned.tokens) < recorded:
        rung.detail = f"judged up to position {len(planned.tokens)} of {recorded}"


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
    rung: Rung,
    tensor: str,
    found: np.ndarray,
    planned: np.ndarray,
    exact: np.ndarray,
    positions: np.ndarray,
    bound: Callable[[float], float],
) -> None:
    """Judge ``[N, K]`` values of ``positions [K]``: all of them, and each position by itself."""
    if found.shape != planned.shape or exact.shape != planned.shape:
        rung.fail(f"{tensor} of the long golden: {list(found.shape)}, expected {list(planned.shape)}")
        return
    error, worst = relative_rms(planned, exact), channel_error(planned, exact)
    whole, single = bound(error), CHANNEL_FACTOR * bound(0) + bound(worst) - bound(0)
    passing = rung.state != "failed"
    rung.compare(LONG, tensor, found, planned, whole, error, single)
    if passing and rung.state == "failed":
        with np.errstate(invalid="ignore", over="ignore"):
            errors, error = channel_errors(found, planned), relative_rms(found, planned)
        place = int(np.argmax(errors))  # NaN counts as largest
        if not np.isfinite(found).all():
            what = f"NaN or infinity at position {positions[place]}"
        elif errors[place] > single:
            what = f"off by {errors[place]:.2g} at position {positions[place]} ({single:.2g} is allowed)"
        else:
            what = f"off by {error:.2g} ({whole:.2g} is allowed), most at position {positions[place]}"
        rung.detail = f"{tensor}: {what}"
