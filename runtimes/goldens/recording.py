"""Recording of goldens: the results of a chain for fixed images and prompts.

The chain is that of the fp32 reference; ``compare`` records another bundle instead.
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
from runtimes.goldens.golden import (
    GREEDY_TOKENS,
    Golden,
    check_finite,
    greedy_decode,
    is_golden,
    load_golden,
    save_golden,
)
from runtimes.goldens.taps import Taps
from runtimes.images import load_image
from runtimes.preprocess import resize_and_pad, to_pixel_values
from runtimes.text.tokenizer import expand_images

CACHE_BYTES = 5 << 29  # of a KV cache for prompts decoded together: four of the 7B with one image


@dataclass(frozen=True)
class GoldenRequest:
    """A raw prompt and the image files for its placeholders; their names must differ."""

    prompt: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class _Planned:
    """A request that fits into the decoder's positions, with its number and tokens."""

    index: int
    request: GoldenRequest
    tokens: np.ndarray  # [S] int64, images expanded

    @property
    def steps(self) -> int:
        """Number of tokens in the KV cache."""
        return len(self.tokens) + GREEDY_TOKENS


def record_goldens(
    chain: Chain,
    requests: Sequence[GoldenRequest],
    folder: Path,
    checkpoint: str,
    max_positions: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    tap: Callable[[Golden], dict[str, Taps]] | None = None,
    on_saved: Callable[[Path], None] = lambda file: None,
) -> None:
    """Write images and ``NN.safetensors`` for every request into ``folder``.

    As many prompts as ``CACHE_BYTES`` allow are decoded together: if the reference streams its
    weights, a step takes the same time for one prompt as for all. A group of goldens that already
    exists is kept.

    Args:
        chain: the components.
        requests: prompts and images.
        folder: output folder.
        checkpoint: SHA-256 of the checkpoint, which is stored in the goldens.
        max_positions: positions of the decoder; longer requests are skipped.
        on_step: called with the number of finished steps and their total.
        tap: records the taps of all components for the first golden.
        on_saved: called with each golden's file.

    Raises:
        UserError: the decoder has too few positions for every request, or a result is not finite.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    planned = _plan(chain, requests, max_positions)
    for image in {image for item in planned for image in item.request.images}:
        shutil.copyfile(image, folder / "images" / image.name)
    there = {file for file in folder.glob("*.safetensors") if is_golden(file.name)}
    for file in there - {_file(folder, item) for item in planned}:
        file.unlink()
    groups = _groups(chain, planned)
    done, total = 0, len(planned) + bool(tap) + GREEDY_TOKENS * len(groups)

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        on_step(done, total)

    for group in groups:
        tapped = tap is not None and group[0].index == 0
        files = [_file(folder, item) for item in group]
        if all(_is_kept(file, item, checkpoint) for file, item in zip(files, group, strict=True)):
            step(len(group) + tapped + GREEDY_TOKENS)
            continue
        goldens = []
        for item in group:
            goldens.append(_prepare(chain, item, folder / "images", checkpoint))
            step()
        if tap and tapped:
            goldens[0] = replace(goldens[0], taps=tap(goldens[0]))
            step()
        embeds = [chain.merge(golden.prompt_tokens, golden.image_embeds) for golden in goldens]
        tokens, logits = greedy_decode(chain, embeds, GREEDY_TOKENS, step)
        for row, (golden, file) in enumerate(zip(goldens, files, strict=True)):
            recorded = replace(golden, greedy_tokens=tokens[row].astype(np.int64), logits=logits[row])
            check_finite(recorded, "The output of the model")
            save_golden(recorded, file)
            on_saved(file)


def _file(folder: Path, item: _Planned) -> Path:
    return folder / f"{item.index:02}.safetensors"


def _is_kept(file: Path, item: _Planned, checkpoint: str) -> bool:
    """Whether the golden of a request already exists."""
    try:
        golden = load_golden(file)
    except UserError:
        return False
    images = tuple(source.name for source in item.request.images)
    return (golden.checkpoint, golden.prompt, golden.images) == (checkpoint, item.request.prompt, images)


def _plan(chain: Chain, requests: Sequence[GoldenRequest], max_positions: int) -> list[_Planned]:
    """Number the requests that fit."""
    planned: list[_Planned] = []
    for request in requests:
        ids = chain.tokenizer.encode(request.prompt)
        tokens = expand_images(ids, chain.tokenizer.spec, len(request.images))
        item = _Planned(len(planned), request, tokens)
        if item.steps <= max_positions:
            planned.append(item)
    if not planned:
        raise UserError(
            f"The decoder's {max_positions} positions are too few for goldens; export with --no-goldens."
        )
    return planned


def _prepare(chain: Chain, item: _Planned, folder: Path, checkpoint: str) -> Golden:
    """Run everything before the decoder; greedy tokens and logits are still empty."""
    images = [folder / source.name for source in item.request.images]
    spec = chain.preprocessing
    squares = [resize_and_pad(load_image(image, spec.on_white), spec) for image in images]
    features = chain.encode_pixels(np.stack([to_pixel_values(square, spec) for square in squares]))
    return Golden(
        checkpoint=checkpoint,
        prompt=item.request.prompt,
        images=tuple(image.name for image in images),
        squares=np.stack(squares),
        features=features,
        image_embeds=chain.adapt(features),
        prompt_tokens=item.tokens,
        greedy_tokens=np.empty(0, np.int64),
        logits=np.empty((0, 0), np.float32),
    )


def _groups(chain: Chain, planned: Sequence[_Planned]) -> list[list[_Planned]]:
    """Group the requests by length so that no KV cache exceeds ``CACHE_BYTES``."""
    groups: list[list[_Planned]] = [[]]
    for item in sorted(planned, key=lambda item: item.steps):
        rows = len(groups[-1]) + 1
        if groups[-1] and cache_bytes(chain.decoder.contract.states, rows, item.steps) > CACHE_BYTES:
            groups.append([])
        groups[-1].append(item)
    return [sorted(group, key=lambda item: item.index) for group in groups]
