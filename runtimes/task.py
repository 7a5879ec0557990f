"""Task accuracy: questions with one right answer, asked through a pipeline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from runtimes.prompt import Message
from runtimes.sampling import GenerationOptions


@dataclass(frozen=True)
class TaskItem:
    """One question: images, the turns before it, and the only right answer."""

    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    expected: str
    kind: str


@dataclass
class TaskScore:
    """Right answers and questions, overall and by kind, and the wrong ones."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[TaskItem, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Exact match over all questions, 0 to 1."""
        return self.right.total() / max(self.asked.total(), 1)

    def by_kind(self) -> dict[str, float]:
        return {kind: self.right[kind] / count for kind, count in sorted(self.asked.items())}


def load_task(file: Path) -> list[TaskItem]:
    """Items of a JSONL file, image paths relative to it.

    Each line has ``images`` (or ``image``), ``question`` (or ``prompt``), ``expected``, and
    optionally ``history`` (messages) and ``kind``.

    Raises:
        UserError: the file is missing, or a line cannot be read (it is named).
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"The task file {file} cannot be read: {reason}.") from error
    items = [_item(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UserError(f"The task file {file} has no questions.")
    return items


def _item(file: Path, number: int, line: str) -> TaskItem:
    try:
        row = json.loads(line)
        images = row["images"] if "images" in row else [row["image"]]
        question = row["question"] if "question" in row else row["prompt"]
        history = [Message.from_dict(turn) for turn in row.get("history", [])]
        return TaskItem(
            images=tuple(file.parent / name for name in images),
            messages=(*history, Message.from_dict({"role": "user", "content": question})),
            expected=str(row["expected"]).strip(),
            kind=str(row.get("kind", "all")),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"Line {number} of {file} is no task item ({error}).") from error


def run_task(
    pipeline: Pipeline, items: list[TaskItem], on_item: Callable[[], None], max_new_tokens: int = 48
) -> TaskScore:
    """Ask every question greedily; an answer is right when it equals the expected text."""
    score = TaskScore()
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    for item in items:
        answer = pipeline.chat(item.messages, item.images, options).text.strip()
        score.asked[item.kind] += 1
        score.answers.append(answer)
        if answer == item.expected:
            score.right[item.kind] += 1
        else:
            score.wrong.append((item, answer))
        on_item()
    return score
