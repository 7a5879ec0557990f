"""Training batches for the tiny model; stage and step alone determine a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from reference.tiny.pictures import CANVAS, COLORS, COLUMNS, SHAPES, Scene, draw_scene
from reference.tiny.questions import Question, image_preamble, make_chat
from runtimes.text.prompt import BOS, EOS, IMAGE_PLACEHOLDER, PAD, SYSTEM_PROMPT, Message, format_chat

GRID = 8  # image tokens per side
OBJECT_NAMES = [str(digit) for digit in range(10)] + list(SHAPES)
# Classes of the dense heads; 0 means background.
DENSE_HEADS = {
    "name": len(OBJECT_NAMES) + 1,
    "colour": len(COLORS) + 1,
    "order": len(COLUMNS) + 1,
    "row": GRID,
    "column": GRID,
}


@dataclass
class Batch:
    """Pictures of one step with their dense targets, and in stage 2 conversations about them."""

    pixels: Tensor  # [N, 3, 128, 128] in [0, 1]; stage 1
    pooled: Tensor  # [N] indices of pictures in the pool; stage 2
    dense: Tensor  # [N, heads, T]
    tokens: Tensor  # [B, S]; stage 2
    answers: Tensor  # [B, S] bool: the token belongs to an answer, so the loss includes it


def to_pixels(image: Image.Image) -> np.ndarray:
    """Preprocess a square picture as the runtime does; returns ``[3, 128, 128]`` float32."""
    small = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255


def dense_targets(scene: Scene) -> np.ndarray:
    """Return the classes of each image token's cell, ``[heads, GRID**2]`` int64.

    ``name`` and ``colour`` are those of the object that covers the cell; ``order`` is set only in
    the cell at the object's center.
    """
    cell = CANVAS / GRID
    targets = np.zeros((len(DENSE_HEADS), GRID, GRID), dtype=np.int64)
    centers = (np.arange(GRID) + 0.5) * cell
    for item in scene.digits + scene.shapes:
        x0, y0, x1, y1 = item.box
        columns = (centers >= x0 - 2) & (centers <= x1 + 2)
        rows = (centers >= y0 - 2) & (centers <= y1 + 2)
        covered = rows[:, None] & columns[None, :]
        middle = min(int((y0 + y1) / 2 / cell), GRID - 1), min(int((x0 + x1) / 2 / cell), GRID - 1)
        covered[middle] = True
        targets[0][covered] = OBJECT_NAMES.index(item.name) + 1
        targets[1][covered] = list(COLORS).index(item.color) + 1
        targets[2][middle] = item.order + 1
    targets[3], targets[4] = np.indices((GRID, GRID))
    return targets.reshape(len(DENSE_HEADS), -1)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token of the tokenizer's vocabulary."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def encode_chat(tokenizer: Tokenizer, questions: list[Question], images: int) -> tuple[list[int], list[bool]]:
    """Encode a conversation in the runtime's prompt format.

    Args:
        tokenizer: has the special tokens of the format.
        questions: the turns.
        images: pictures in the first turn.

    Returns:
        Token ids, and for each whether it belongs to an answer.
    """
    image_id = token_id(tokenizer, IMAGE_PLACEHOLDER)
    ids, answers = [token_id(tokenizer, BOS)], [False]
    for turn, question in enumerate(questions):
        content = (image_preamble(images) if turn == 0 else "") + question.text
        prompt = format_chat([Message("user", content)], SYSTEM_PROMPT if turn == 0 else "")
        for text, is_answer in ((prompt, False), (f" {question.answer}{EOS}", True)):
            for token in tokenizer.encode(text, add_special_tokens=False).ids:
                count = GRID**2 if token == image_id else 1
                ids += [token] * count
                answers += [is_answer] * count
    return ids, answers


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    """Pad rows on the right to a tensor ``[B, S]``."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


EMPTY_TENSOR = torch.zeros(0)


class DenseBatches(Dataset[Batch]):
    """Batches of stage 1: new pictures with dense targets."""

    def __init__(self, size: int) -> None:
        """Set the pictures per batch."""
        self.size = size

    def __len__(self) -> int:
        """Return a number above any step."""
        return 1 << 30

    def __getitem__(self, step: int) -> Batch:
        """Draw the batch of a step."""
        drawn = [draw_scene((1, step, index)) for index in range(self.size)]
        pixels = torch.from_numpy(np.stack([to_pixels(image) for image, _ in drawn]))
        return Batch(
            pixels,
            EMPTY_TENSOR,
            _stack_dense_targets([scene for _, scene in drawn]),
            EMPTY_TENSOR,
            EMPTY_TENSOR,
        )


class ChatBatches(Dataset[Batch]):
    """Batches of stage 2: conversations about pictures of a pool with precomputed features."""

    def __init__(self, scenes: list[Scene], size: int, tokenizer: Tokenizer) -> None:
        """Set the scenes of the pool and the pictures per batch."""
        self.scenes, self.size, self.tokenizer = scenes, size, tokenizer

    def __len__(self) -> int:
        """Return a number above any step."""
        return 1 << 30

    def __getitem__(self, step: int) -> Batch:
        """Choose the pictures of a step and encode conversations about them."""
        rng = np.random.default_rng((2, step))
        chosen = rng.integers(len(self.scenes), size=self.size)
        scenes = [self.scenes[index] for index in chosen]
        dense = _stack_dense_targets(scenes)
        tokens, answers = encode_conversations(rng, scenes, self.tokenizer)
        return Batch(EMPTY_TENSOR, torch.from_numpy(chosen), dense, tokens, answers)


def _stack_dense_targets(scenes: list[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([dense_targets(scene) for scene in scenes]))


def encode_conversations(
    rng: np.random.Generator, scenes: list[Scene], tokenizer: Tokenizer
) -> tuple[Tensor, Tensor]:
    """Encode chats about the scenes, in order; returns tokens and answer mask, ``[B, S]``.

    Two thirds of the pictures are in chats about two pictures. The numbers of turns give both kinds
    of chat about the same length.
    """
    ids, answers, first = [], [], 0
    while first < len(scenes):
        images = 2 if first + 1 < len(scenes) and first < len(scenes) * 2 // 3 else 1
        questions = make_chat(rng, scenes[first : first + images], turns=6 if images == 2 else 9)
        row_ids, row_answers = encode_chat(tokenizer, questions, images)
        ids.append(row_ids)
        answers.append([int(answer) for answer in row_answers])
        first += images
    return pad_rows(ids, token_id(tokenizer, PAD)), pad_rows(answers, 0).bool()
