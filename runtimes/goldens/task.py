"""Task accuracy: questions with one correct answer, answered by a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.bundle.files import read_json_lines
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from runtimes.text.prompt import Message


@dataclass(frozen=True)
class TaskItem:
    """One question and its only correct answer.

    Args:
        images: image files.
        messages: earlier turns, then the question.
        expected: the correct answer.
        kind: category of the question.
        reference: the fp32 reference's answer, if recorded.
        reference_tokens: number of tokens of the fp32 reference's answer, if recorded.
    """

    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    expected: str
    kind: str
    reference: str | None = None
    reference_tokens: int | None = None


@dataclass
class TaskScore:
    """Results of a task.

    Args:
        correct: number of correct answers by kind.
        questions: number of questions by kind.
        incorrect: questions with an incorrect answer, and the answer.
        answers: all answers, in order.
        tokens: number of tokens of each answer.
    """

    correct: Counter[str] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    incorrect: list[tuple[TaskItem, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, item: TaskItem, answer: str, tokens: int) -> None:
        """Add an answer, which is correct if it equals the expected text."""
        self.questions[item.kind] += 1
        self.answers.append(answer)
        self.tokens.append(tokens)
        if answer == item.expected:
            self.correct[item.kind] += 1
        else:
            self.incorrect.append((item, answer))

    def merge(self, other: TaskScore) -> None:
        """Append the results of the questions that come next."""
        self.correct += other.correct
        self.questions += other.questions
        self.incorrect += other.incorrect
        self.answers += other.answers
        self.tokens += other.tokens

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of an answer."""
        return sum(self.tokens) / max(len(self.tokens), 1)

    @property
    def accuracy(self) -> float:
        """Share of exact matches over all questions, 0 to 1."""
        return self.correct.total() / max(self.questions.total(), 1)

    def by_kind(self) -> dict[str, float]:
        """Return the accuracy of each kind, 0 to 1."""
        return {kind: self.correct[kind] / count for kind, count in sorted(self.questions.items())}


def load_task(file: Path) -> list[TaskItem]:
    """Read the items of a JSONL file.

    Each line has ``images`` (or ``image``; paths are relative to the file), ``question`` (or
    ``prompt``), ``expected``, and optionally ``history`` (messages), ``kind``, ``reference`` and
    ``reference_tokens`` (the fp32 reference's answer and its number of tokens).

    Raises:
        UserError: the file is missing, or a line is not a task item; the message has its number.
    """
    items = [_item(file, number, row) for number, row in read_json_lines(file, "task file")]
    if not items:
        raise UserError(f"The task file {file} has no questions.")
    return items


def _item(file: Path, number: int, row: Any) -> TaskItem:
    try:
        images = row["images"] if "images" in row else [row["image"]]
        question = row["question"] if "question" in row else row["prompt"]
        history = [Message.from_dict(turn) for turn in row.get("history", [])]
        expected, reference, tokens = row["expected"], row.get("reference"), row.get("reference_tokens")
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise TypeError("images must be a list of file names")
        if not isinstance(expected, (str, int, float)) or not isinstance(reference, (str, type(None))):
            raise TypeError("expected and reference must be texts")
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise TypeError("reference_tokens must be a positive number")
        return TaskItem(
            images=tuple(file.parent / name for name in images),
            messages=(*history, Message.from_dict({"role": "user", "content": question})),
            expected=str(expected).strip(),
            kind=str(row.get("kind", "all")),
            reference=reference,
            reference_tokens=tokens,
        )
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"Line {number} of {file} is not a valid task item ({error}).") from error


def run_task(
    pipeline: Pipeline, items: list[TaskItem], on_item: Callable[[], None], max_new_tokens: int = 48
) -> TaskScore:
    """Answer every question greedily, without speculative tokens."""
    score = TaskScore()
    options = GenerationOptions(max_new_tokens=max_new_tokens, drafts=False)
    for item in items:
        answer = pipeline.chat(item.messages, item.images, options)
        score.add(item, answer.text.strip(), len(answer.tokens))
        on_item()
    return score


def recorded_score(items: list[TaskItem]) -> TaskScore | None:
    """Score the recorded reference answers; None if a question has none."""
    score = TaskScore()
    for item in items:
        if item.reference is None or item.reference_tokens is None:
            return None
        score.add(item, item.reference, item.reference_tokens)
    return score
