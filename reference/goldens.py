"""Recording goldens: what the reference computes for fixed images and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.checkpoint import TINY
from runtimes.chain import Chain
from runtimes.goldens import GREEDY_TOKENS, Golden, greedy_tokens, save_golden, teacher_forced
from runtimes.pipeline import Pipeline
from runtimes.preprocess import load_image, resize_and_pad, to_pixel_values


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


def record_goldens(chain: Chain, folder: Path, on_golden: Callable[[], None]) -> None:
    """Write images and ``NN.safetensors`` for every request into ``folder``.

    Args:
        chain: the reference chain (``reference.session.reference_chain``).
        on_golden: called after each golden.
    """
    (folder / "images").mkdir(parents=True)
    pipeline = Pipeline(chain, chain.tokenizer.spec.system_prompt, capacity=0)
    for index, request in enumerate(golden_requests()):
        for name in request.images:
            shutil.copyfile(TINY / "heldout" / name, folder / "images" / Path(name).name)
        images = [folder / "images" / Path(name).name for name in request.images]
        squares = [resize_and_pad(load_image(file), chain.preprocessing) for file in images]
        pixels = np.stack([to_pixel_values(square, chain.preprocessing) for square in squares])
        features = chain.encode_pixels(pixels)
        image_embeds = chain.adapt(features)
        prompt = pipeline.format(request.question, len(images))
        inputs = chain.embed_prompt(prompt, images)
        tokens = greedy_tokens(chain, inputs.embeds, GREEDY_TOKENS)
        golden = Golden(
            prompt=prompt,
            images=tuple(file.name for file in images),
            squares=np.stack(squares),
            features=features,
            image_embeds=image_embeds,
            prompt_tokens=np.array(inputs.tokens, dtype=np.int64),
            greedy_tokens=np.array(tokens, dtype=np.int64),
            logits=teacher_forced(chain, inputs.embeds, tokens),
        )
        save_golden(golden, folder / f"{index:02}.safetensors")
        on_golden()
