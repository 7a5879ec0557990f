"""Running the stages of the parity check, from preprocessing to greedy tokens, on every golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL.Image import Image

from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.metrics import tie_margin
from dsvl_export.parity_check.quantization_error import CHAIN, QuantizationError
from dsvl_export.parity_check.result import ParityResult, TokenComparison
from dsvl_export.parity_check.stage_tensors import STEPS, stage_tensors
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden, greedy_decode
from runtimes.images import load_image
from runtimes.preprocess import resize_and_pad


def run_stages(
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    result: ParityResult,
    quantization_error: QuantizationError,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Fill in the stages ``preprocess`` to ``greedy_tokens`` of a result, and its tokens.

    Args:
        chain: the components to judge.
        goldens: recorded outputs of the reference.
        checkpoint: SHA-256 of the checkpoint that the goldens were recorded from.
        result: the result to fill in.
        quantization_error: error of the reference itself at this precision.
        on_step: called with the name of the step, the goldens done and all goldens.

    Raises:
        UserError: a golden does not fit the contracts of the components.
    """
    result.goldens = len(goldens.files)
    for position, index in enumerate(goldens.numbers):
        on_step("goldens", position, result.goldens)
        golden = goldens.load(position, checkpoint)
        goldens.check_fits(position, golden, chain)
        images = [load_image(image) for image in goldens.images(golden)]
        squares = np.stack([resize_and_pad(image, chain.preprocessing) for image in images])
        exact = result.bound("preprocess", None)
        result.stage("preprocess").compare(index, "squares", squares, golden.squares, exact)
        for tensor in stage_tensors(chain, golden, steps=STEPS):
            measured = quantization_error.at(index, tensor.stage)
            bound = result.bound(tensor.stage, measured)
            stage = result.stage(tensor.stage)
            stage.compare(index, tensor.name, tensor.actual, tensor.expected, bound, measured)
            if tensor.stage.endswith("logits"):
                measured = quantization_error.tie_error(index, tensor.stage)
                tie_error = result.tie_error(tensor.stage, measured)
                stage.compare_top1(index, tensor.actual, tensor.expected, tie_error)
        tie_error = result.tie_error("greedy_tokens", quantization_error.tie_error(index, CHAIN))
        _compare_tokens(chain, golden, images, index, result, tie_error)
    on_step("goldens", result.goldens, result.goldens)


def _compare_tokens(
    chain: Chain,
    golden: Golden,
    images: list[Image],
    index: int,
    result: ParityResult,
    tie_error: float,
) -> None:
    """Compare the greedy tokens of all components together, from the image file on.

    A first difference that is a near tie for the reference is reported, and does not fail.
    """
    stage = result.stage("greedy_tokens")
    prompt = chain.prepare(golden.prompt, images)
    if prompt.tokens != golden.prompt_tokens.tolist():
        stage.fail(f"the tokenizer reads the prompt of golden {index} differently")
        return
    (tokens,), (logits,) = greedy_decode(chain, [chain.embed(prompt)], len(golden.greedy_tokens))
    if not np.isfinite(logits).all():
        stage.fail(f"NaN or infinity in the logits of golden {index}")
        return
    expected, actual = golden.greedy_tokens.tolist(), tokens.tolist()
    pieces = (chain.tokenizer.pieces(expected), chain.tokenizer.pieces(actual))
    comparison = TokenComparison(index, golden.images, golden.prompt, expected, actual, *pieces)
    stage.passed()
    if actual != expected:
        step = next(i for i, pair in enumerate(zip(actual, expected, strict=True)) if pair[0] != pair[1])
        row = golden.logits[step].astype(np.float64)
        margin = float(row[expected[step]] - row[actual[step]])
        tie = margin <= tie_margin(row, tie_error)
        comparison = replace(comparison, diverges_at=step, near_tie=tie, margin=margin)
        difference = (
            f"golden {index} {'has a near tie' if tie else 'differs'} at token {step} (margin {margin:.2g})"
        )
        if tie:
            stage.detail = stage.detail or difference
        else:
            stage.fail(difference)
    result.tokens.append(comparison)
