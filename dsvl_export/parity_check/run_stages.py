"""Climbing: every rung for every golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL.Image import Image

from dsvl_export.parity_check.metrics import tie_margin
from dsvl_export.parity_check.quantization_error import CHAIN, Noise
from dsvl_export.parity_check.result import ParityResult, TokenComparison
from dsvl_export.parity_check.stages import STEPS, Goldens, stages
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden, greedy_decode
from runtimes.images import load_image
from runtimes.preprocess import resize_and_pad


def climb(
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    result: ParityResult,
    noise: Noise,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Fill the result's rungs (all but the task) and tokens."""
    result.goldens = len(goldens.files)
    for position, index in enumerate(goldens.numbers):
        on_step("goldens", position, result.goldens)
        golden = goldens.load(position, checkpoint)
        goldens.check_fits(position, golden, chain)
        images = [load_image(image) for image in goldens.images(golden)]
        squares = np.stack([resize_and_pad(image, chain.preprocessing) for image in images])
        exact = result.bound("preprocess", None)
        result.rung("preprocess").compare(index, "squares", squares, golden.squares, exact)
        for stage in stages(chain, golden, steps=STEPS):
            measured = noise.of(index, stage.rung)
            bound = result.bound(stage.rung, measured)
            rung = result.rung(stage.rung)
            rung.compare(index, stage.tensor, stage.found, stage.expected, bound, measured)
            if stage.rung.endswith("logits"):
                rung.compare_choices(
                    index, stage.found, stage.expected, result.tie_noise(noise.ties(index, stage.rung))
                )
        tie_noise = result.tie_noise(noise.ties(index, CHAIN))
        _compare_tokens(chain, golden, images, index, result, tie_noise)
    on_step("goldens", result.goldens, result.goldens)


def _compare_tokens(
    chain: Chain, golden: Golden, images: list[Image], index: int, result: ParityResult, noise: float
) -> None:
    """Greedy tokens from the image on, through the whole chain.

    A first difference that is a near tie for the reference is reported, and does not fail.
    """
    rung = result.rung("greedy_tokens")
    own = chain.prepare(golden.prompt, images)
    if own.tokens != golden.prompt_tokens.tolist():
        rung.fail(f"the tokenizer reads the prompt of golden {index} differently")
        return
    (tokens,), (logits,) = greedy_decode(chain, [chain.embed(own)], len(golden.greedy_tokens))
    if not np.isfinite(logits).all():
        rung.fail(f"NaN or infinity in the logits of golden {index}")
        return
    expected, found = golden.greedy_tokens.tolist(), tokens.tolist()
    pieces = (chain.tokenizer.pieces(expected), chain.tokenizer.pieces(found))
    comparison = TokenComparison(index, golden.images, golden.prompt, expected, found, *pieces)
    rung.passed()
    if found != expected:
        step = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        row = golden.logits[step].astype(np.float64)
        margin = float(row[expected[step]] - row[found[step]])
        tie = margin <= tie_margin(row, noise)
        comparison = replace(comparison, diverges_at=step, near_tie=tie, margin=margin)
        what = (
            f"golden {index} {'has a near tie' if tie else 'differs'} at token {step} (margin {margin:.2g})"
        )
        if tie:
            rung.detail = rung.detail or what
        else:
            rung.fail(what)
    result.tokens.append(comparison)
