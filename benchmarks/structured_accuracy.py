"""Accuracy of JSON answers beside free text: the tiny model, after some training with JSON answers.

    python benchmarks/structured_accuracy.py WORK [--steps 900]

The bundled tiny model has never seen JSON. This trains its adaptor and decoder further on conversations
whose answers are ``{"answer": …}``, exports both checkpoints, and asks the 500 held-out questions: the
bundled model in free text, the trained one in free text and with the schema.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsvl_export.exporter.export import export
from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.write_original import write_original_checkpoint
from reference.tiny import HELDOUT, TINY
from reference.tiny.batches import EMPTY_TENSOR, Batch, encode_chat, pad_rows, to_pixels, token_id
from reference.tiny.pictures import draw_scene
from reference.tiny.questions import make_chat
from runtimes.generation.sampling import GenerationOptions
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.text.prompt import IMAGE_PLACEHOLDER, PAD

SCHEMA = {
    "type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"],
    "additionalProperties": False,
}  # fmt: skip
POOL, BATCH, RATE = 6_000, 48, 5e-4


class JsonChats(Dataset[Batch]):
    """Conversations about the pictures of a pool, one picture in each, with JSON answers."""

    def __init__(self, scenes: list[Any], tokenizer: Tokenizer) -> None:
        self.scenes, self.tokenizer = scenes, tokenizer

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((3, step))
        chosen = rng.integers(len(self.scenes), size=BATCH)
        ids, answers = [], []
        first = 0
        while first < BATCH:
            images = 2 if first + 1 < BATCH and first < BATCH * 2 // 3 else 1
            scenes = [self.scenes[index] for index in chosen[first : first + images]]
            questions = [
                replace(question, answer=json.dumps({"answer": question.answer}))
                for question in make_chat(rng, scenes, 3 * images)
            ]
            row, is_answer = encode_chat(self.tokenizer, questions, images)
            ids.append(row)
            answers.append([int(value) for value in is_answer])
            first += images
        pad = token_id(self.tokenizer, PAD)
        return Batch(
            EMPTY_TENSOR,
            torch.from_numpy(chosen),
            EMPTY_TENSOR,
            pad_rows(ids, pad),
            pad_rows(answers, 0).bool(),
        )


def train(folder: Path, steps: int) -> None:
    """Train the bundled model further, and write the checkpoint."""
    model = open_checkpoint("tiny").load_model().float()
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    image_id = token_id(tokenizer, IMAGE_PLACEHOLDER)
    scenes, features = pool(model)
    trained = [p for name, p in model.named_parameters() if not name.startswith("vision_encoder")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step, batch in enumerate(
        DataLoader(JsonChats(scenes, tokenizer), batch_size=None, sampler=range(steps))
    ):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30, (steps - step) / steps)
        with torch.autocast("cpu", torch.bfloat16):
            embeds = model.adaptor(*(part[batch.pooled] for part in features))
            logits = model.logits(model.merge(batch.tokens, embeds, image_id))
        is_answer = batch.answers[:, 1:]
        target = batch.tokens[:, 1:][is_answer]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][is_answer].float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    write_original_checkpoint(model, json.loads((TINY / "config.json").read_text()), tokenizer, folder)


@torch.no_grad()
def pool(model: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """Scenes of new pictures, and their vision features."""
    scenes: list[Any] = []
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, POOL, 60):
        drawn = [draw_scene((3, index)) for index in range(first, first + 60)]
        scenes += [scene for _, scene in drawn]
        pixels = torch.from_numpy(np.stack([to_pixels(image) for image, _ in drawn]))
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(tuple(part.to(torch.bfloat16) for part in model.vision_encoder(pixels)))
    return scenes, tuple(torch.cat(part) for part in zip(*parts, strict=True))


def accuracy(bundle: Path, response_format: Any, is_json: bool) -> float:
    """Share of the held-out questions whose answer is right."""
    pipeline, items, right = Pipeline.open(bundle, threads=2), load_task(HELDOUT), 0
    options = GenerationOptions(128, response_format=response_format)
    for item in items:
        text = pipeline.chat(item.messages, item.images, options).text
        try:
            right += (json.loads(text)["answer"] if is_json else text) == item.expected
        except (ValueError, TypeError, KeyError):
            continue
    return right / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    given = parser.parse_args()
    checkpoint = given.work / "checkpoint"
    given.work.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "config.json").exists():
        train(checkpoint, given.steps)
    bundles = {"tiny": "tiny", "trained": str(checkpoint)}
    for name, source in bundles.items():
        if not (given.work / name / "manifest.json").exists():
            export(source, given.work / name, goldens=False)
    found = {
        "tiny, free text": accuracy(given.work / "tiny", None, False),
        "tiny, schema": accuracy(given.work / "tiny", SCHEMA, True),
        "trained, free text": accuracy(given.work / "trained", None, True),
        "trained, schema": accuracy(given.work / "trained", SCHEMA, True),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
