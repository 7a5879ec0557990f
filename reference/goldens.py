"""Recording goldens: what the reference computes for fixed images and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.checkpoint import TINY
from runtimes.chain import Chain, PromptInputs
from runtimes.errors import UserError
from runtimes.goldens import GREEDY_TOKENS, Golden, greedy, save_golden
from runtimes.preprocess import load_image, resize_and_pad, to_pixel_values
from runtimes.prompt import Message, format_chat

CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class GoldenRequest:
    """Images (file names in the held-out set) and a question about them."""

    images: tuple[str, ...]
    question: str


def golden_requests(count: int = 8) -> list[GoldenRequest]:
    """The first questions of different pictures of the bundled held-out set, two with two images."""
    rows = [json.loads(line) for line in (TINY / "heldout" / "questions.jsonl").read_text().splitlines()]
    chosen: list[GoldenRequest] = []
    for row in rows:
        request = GoldenRequest(tuple(row["images"]), row["question"])
        pairs = sum(len(item.images) > 1 for item in chosen)
        fresh = not any(set(request.images) & set(item.images) for item in chosen)
        if fresh and (len(request.images) == 1 or pairs < 2) and len(chosen) < count:
            chosen.append(request)
    return chosen


@dataclass(frozen=True)
class _Prepared:
    """A request up to the decoder's input."""

    prompt: str
    images: tuple[str, ...]
    squares: np.ndarray
    features: dict[str, np.ndarray]
    image_embeds: np.ndarray
    inputs: PromptInputs


def record_goldens(
    chain: Chain, folder: Path, max_positions: int, on_step: Callable[[int, int], None]
) -> None:
    """Write images and ``NN.safetensors`` for every request into ``folder``.

    Prompts are decoded together, as many as ``CACHE_BYTES`` allow: where the reference streams its
    weights, a step costs the same for one as for all.

    Args:
        chain: the reference chain (``reference.session.reference_chain``).
        max_positions: of the decoder; longer requests are left out.
        on_step: called with the steps done and their total.

    Raises:
        UserError: the decoder has too few positions for any request.
    """
    (folder / "images").mkdir(parents=True)
    requests = golden_requests()
    prepared = []
    for request in requests:
        prepared.append(_prepare(chain, request, folder / "images"))
        on_step(len(prepared), len(requests) + GREEDY_TOKENS)
    prepared = [item for item in prepared if len(item.inputs.keys) + GREEDY_TOKENS <= max_positions]
    if not prepared:
        raise UserError(
            f"The decoder's {max_positions} positions are too few for goldens; export with --no-goldens."
        )
    groups = _groups(chain, prepared)
    done, total = len(requests), len(requests) + GREEDY_TOKENS * len(groups)

    def on_token() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    index = 0
    for group in groups:
        tokens, logits = greedy(chain, [item.inputs.embeds for item in group], GREEDY_TOKENS, on_token)
        for row, item in enumerate(group):
            golden = Golden(
                prompt=item.prompt,
                images=item.images,
                squares=item.squares,
                features=item.features,
                image_embeds=item.image_embeds,
                prompt_tokens=np.array(item.inputs.tokens, dtype=np.int64),
                greedy_tokens=tokens[row].astype(np.int64),
                logits=logits[row],
            )
            save_golden(golden, folder / f"{index:02}.safetensors")
            index += 1


def _prepare(chain: Chain, request: GoldenRequest, folder: Path) -> _Prepared:
    """Copy the images into ``folder`` and run everything before the decoder."""
    images = [folder / Path(name).name for name in request.images]
    for name, image in zip(request.images, images, strict=True):
        shutil.copyfile(TINY / "heldout" / name, image)
    squares = [resize_and_pad(load_image(image), chain.preprocessing) for image in images]
    features = chain.encode_pixels(
        np.stack([to_pixel_values(square, chain.preprocessing) for square in squares])
    )
    prompt = format_chat([Message("user", request.question)], chain.tokenizer.spec.system_prompt)
    return _Prepared(
        prompt=prompt,
        images=tuple(image.name for image in images),
        squares=np.stack(squares),
        features=features,
        image_embeds=chain.adapt(features),
        inputs=chain.embed_prompt(prompt, images),
    )


def _groups(chain: Chain, prepared: list[_Prepared]) -> list[list[_Prepared]]:
    """The requests in order, cut where a group's KV cache would exceed ``CACHE_BYTES``."""
    per_token = sum(
        int(spec.shape[1]) * int(spec.shape[3]) * np.dtype(spec.dtype).itemsize
        for spec in chain.decoder.contract.states
    )
    groups: list[list[_Prepared]] = [[]]
    for item in prepared:
        grown = [*groups[-1], item]
        longest = max(len(member.inputs.keys) for member in grown) + GREEDY_TOKENS
        if groups[-1] and len(grown) * longest * per_token > CACHE_BYTES:
            groups.append([item])
        else:
            groups[-1] = grown
    return groups
