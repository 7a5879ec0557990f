"""Recording goldens: what a chain computes for fixed images and prompts.

The chain is the fp32 reference's; ``compare`` records those of another bundle instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtimes.cache import cache_bytes
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens import GREEDY_TOKENS, Golden, check_finite, greedy, save_golden
from runtimes.preprocess import load_image, resize_and_pad, to_pixel_values
from runtimes.taps import Taps
from runtimes.tokenizer import expand_images

CACHE_BYTES = 5 << 29  # of the KV cache of prompts that are decoded together: four of the 7B's with one image


@dataclass(frozen=True)
class GoldenRequest:
    """A whole prompt and the image files for its placeholders; their names must differ."""

    prompt: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class _Prepared:
    """A request up to the decoder's input."""

    index: int
    golden: Golden  # without tokens and logits
    embeds: np.ndarray  # [S, D]


def record_goldens(
    chain: Chain,
    requests: Sequence[GoldenRequest],
    folder: Path,
    checkpoint: str,
    max_positions: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    tap: Callable[[Golden], dict[str, Taps]] | None = None,
) -> None:
    """Write images and ``NN.safetensors`` for every request into ``folder``.

    Prompts are decoded together, as many as ``CACHE_BYTES`` allow: where the reference streams its weights, a
    step costs the same for one as for all.

    Args:
        checkpoint: SHA-256 of the checkpoint, kept in the goldens.
        max_positions: of the decoder; longer requests are left out.
        on_step: called with the steps done and their total.
        tap: takes the taps of all components, which go into the first golden.

    Raises:
        UserError: the decoder has too few positions for any request, or what is computed is not finite.
    """
    (folder / "images").mkdir(parents=True)
    prepared: list[_Prepared] = []
    for done, request in enumerate(requests, 1):
        item = _prepare(chain, request, folder / "images", checkpoint, len(prepared))
        if len(item.embeds) + GREEDY_TOKENS <= max_positions:
            prepared.append(item)
        on_step(done, len(requests) + GREEDY_TOKENS)
    if not prepared:
        raise UserError(
            f"The decoder's {max_positions} positions are too few for goldens; export with --no-goldens."
        )
    if tap:
        first = prepared[0].golden
        prepared[0] = replace(prepared[0], golden=replace(first, taps=tap(first)))
    groups = _groups(chain, prepared)
    done, total = len(requests), len(requests) + GREEDY_TOKENS * len(groups)

    def on_token() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    for group in groups:
        tokens, logits = greedy(chain, [item.embeds for item in group], GREEDY_TOKENS, on_token)
        for row, item in enumerate(group):
            golden = replace(item.golden, greedy_tokens=tokens[row].astype(np.int64), logits=logits[row])
            check_finite(golden, "What the model computes")
            save_golden(golden, folder / f"{item.index:02}.safetensors")


def _prepare(chain: Chain, request: GoldenRequest, folder: Path, checkpoint: str, index: int) -> _Prepared:
    """Copy the images into ``folder`` and run everything before the decoder."""
    images = [folder / source.name for source in request.images]
    for source, image in zip(request.images, images, strict=True):
        shutil.copyfile(source, image)
    squares = [resize_and_pad(load_image(image), chain.preprocessing) for image in images]
    features = chain.encode_pixels(
        np.stack([to_pixel_values(square, chain.preprocessing) for square in squares])
    )
    image_embeds = chain.adapt(features)
    tokens = expand_images(chain.tokenizer.encode(request.prompt), chain.tokenizer.spec, len(images))
    golden = Golden(
        checkpoint=checkpoint,
        prompt=request.prompt,
        images=tuple(image.name for image in images),
        squares=np.stack(squares),
        features=features,
        image_embeds=image_embeds,
        prompt_tokens=tokens,
        greedy_tokens=np.empty(0, np.int64),
        logits=np.empty((0, 0), np.float32),
    )
    return _Prepared(index, golden, chain.merge(tokens, image_embeds))


def _groups(chain: Chain, prepared: Sequence[_Prepared]) -> list[list[_Prepared]]:
    """The requests by length, cut where a group's KV cache would exceed ``CACHE_BYTES``."""
    groups: list[list[_Prepared]] = [[]]
    for item in sorted(prepared, key=lambda item: len(item.embeds)):
        rows, longest = len(groups[-1]) + 1, len(item.embeds) + GREEDY_TOKENS
        if groups[-1] and cache_bytes(chain.decoder.contract.states, rows, longest) > CACHE_BYTES:
            groups.append([])
        groups[-1].append(item)
    return groups
