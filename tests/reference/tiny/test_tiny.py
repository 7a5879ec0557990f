"""The bundled model is a real one: its figures on questions, fonts and positions it never saw."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT, TINY, TINY_DIGEST
from reference.tiny.batches import encode_chat
from reference.tiny.heldout import QUESTION_COUNT, answer_with_reference, make_held_out_rows
from reference.tiny.pictures import CANVAS, HELD_OUT_FONTS, TRAIN_FONTS, draw_scene
from reference.tiny.questions import HELD_OUT_KINDS, Question, describe_scene, make_chat
from reference.tiny.tokenizer import build_corpus, train_tokenizer
from runtimes.bundle.bundle import Bundle
from runtimes.goldens.task import TaskItem, TaskScore, load_task, run_task
from runtimes.pipeline import Pipeline
from runtimes.text.prompt import SYSTEM_PROMPT, Message, format_chat


@pytest.fixture(scope="module")
def items() -> list[TaskItem]:
    return load_task(HELDOUT)


@pytest.fixture(scope="module")
def scores(tiny_bundle: Bundle, items: list[TaskItem]) -> dict[str, TaskScore]:
    """All questions through ONNX Runtime, in both precisions."""
    return {
        precision: run_task(Pipeline.open(tiny_bundle, precision=precision), items, lambda: None)
        for precision in ("fp32", "fp16")
    }


@pytest.mark.full
def test_exact_match(scores: dict[str, TaskScore]) -> None:
    fp32 = scores["fp32"]
    assert fp32.questions.total() == QUESTION_COUNT == 500
    assert fp32.accuracy >= 0.95
    assert min(fp32.by_kind().values()) >= 0.90, fp32.by_kind()


@pytest.mark.full
def test_half_precision_costs_nothing(scores: dict[str, TaskScore]) -> None:
    assert abs(scores["fp16"].accuracy - scores["fp32"].accuracy) <= 0.005


@pytest.mark.full
def test_the_readme_states_the_measured_figures(scores: dict[str, TaskScore]) -> None:
    readme = (TINY / "README.md").read_text()
    fp32 = scores["fp32"]
    assert f"**{fp32.accuracy:.1%}**" in readme
    for kind, share in fp32.by_kind().items():
        assert f"| {kind} | {share:.1%} |" in readme


def test_answers_come_from_the_pixels(tiny_bundle: Bundle, items: list[TaskItem]) -> None:
    """With the pictures of other questions the answers fall to what guessing gives."""
    single = [item for item in items if len(item.images) == 1 and len(item.messages) == 1]
    shifted = [
        TaskItem(other.images, item.messages, item.expected, item.kind)
        for item, other in zip(single, single[7:] + single[:7], strict=True)
    ]
    score = run_task(Pipeline.open(tiny_bundle), shifted, lambda: None)
    # Chance: as often as another picture of the set happens to have the same answer.
    answers: dict[str, Counter[str]] = {}
    for item in single:
        answers.setdefault(item.kind, Counter())[item.expected] += 1
    chance = sum(
        sum(count * (count - 1) for count in kind.values()) / (kind.total() - 1) for kind in answers.values()
    ) / len(single)
    assert chance < 0.35
    assert score.accuracy < chance + 0.12
    for kind in ("number_2", "number_3"):
        assert score.by_kind()[kind] <= 0.05


def test_recorded_answers_are_those_of_the_bundled_weights(items: list[TaskItem]) -> None:
    """A sixth of them again through PyTorch; the digest says for which weights they hold."""
    assert open_checkpoint("tiny").digest == TINY_DIGEST
    some = items[::6]
    score = answer_with_reference(some)
    assert score.answers == [item.reference for item in some]
    assert score.tokens == [item.reference_tokens for item in some]


def test_the_held_out_set_is_what_its_script_makes(items: list[TaskItem], tmp_path: Path) -> None:
    rows = make_held_out_rows(tmp_path)
    stored = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    for row in stored:  # recorded with the weights, later
        del row["reference"], row["reference_tokens"]
    assert rows == stored
    assert {row["kind"] for row in rows} == set(HELD_OUT_KINDS)
    assert min(Counter(row["kind"] for row in rows).values()) >= 30
    assert sum(len(row["images"]) == 2 for row in rows) >= 50
    assert sum(bool(row["history"]) for row in rows) >= 30


def test_held_out_pictures_differ_in_fonts_and_places() -> None:
    assert not set(HELD_OUT_FONTS) & set(TRAIN_FONTS)
    assert np.array_equal(draw_scene((5, 1))[0], draw_scene((5, 1))[0])
    assert draw_scene((5, 1))[0].size != draw_scene((5, 1), held_out=True)[0].size or not np.array_equal(
        draw_scene((5, 1))[0], draw_scene((5, 1), held_out=True)[0]
    )


def test_scenes_say_what_is_drawn() -> None:
    """The color in the middle of every shape is its color; boxes lie inside the picture."""
    from reference.tiny.pictures import COLORS

    for seed in range(60):
        image, scene = draw_scene((seed, 77))
        pixels, scale = np.asarray(image).astype(int), image.size[0] / CANVAS
        assert scene.number == "".join(digit.name for digit in scene.digits)
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert 0 <= x0 < x1 <= CANVAS
            assert 0 <= y0 < y1 <= CANVAS
            middle = pixels[round((y0 + y1) / 2 * scale), round((x0 + x1) / 2 * scale)]
            nearest = min(COLORS, key=lambda name: np.abs(middle - COLORS[name]).sum())
            assert nearest == shape.color
        for digit in scene.digits:
            assert 0 <= digit.box[0] < digit.box[2] <= CANVAS + 3
            assert (digit.box[1] < CANVAS / 2) == (scene.number_half == "top")


def test_answers_follow_from_the_scene() -> None:
    for seed in range(200):
        _, scene = draw_scene((seed, 78))
        for question in make_chat(np.random.default_rng(seed), [scene], turns=8):
            if question.kind == "count_all":
                assert question.answer == str(len(scene.shapes))
            elif question.kind == "describe":
                assert question.answer == describe_scene(scene)
                assert scene.number in question.answer
            elif question.kind == "exists":
                named = [
                    shape
                    for shape in scene.shapes
                    if shape.color in question.text and shape.name in question.text
                ]
                assert question.answer == ("yes" if named else "no")
            elif question.kind.startswith("number_") and question.kind[-1].isdigit():
                assert question.answer == scene.number


def test_training_text_is_the_prompt_format() -> None:
    """What is trained on is, token by token, what the pipeline asks."""
    tokenizer = train_tokenizer(build_corpus(200))
    questions = [
        Question("x", "What number is in the picture?", "42"),
        Question("x", "Count the shapes.", "3"),
    ]
    ids, answers = encode_chat(tokenizer, questions, 1)
    text = format_chat(
        [Message("user", f"<image_placeholder>{questions[0].text}"), Message("assistant", "42"),
         Message("user", questions[1].text), Message("assistant", "3")],
        SYSTEM_PROMPT,
    )  # fmt: skip
    image = tokenizer.token_to_id("<image_placeholder>")
    collapsed = [token for index, token in enumerate(ids) if token != image or ids[index - 1] != image]
    assert collapsed[1:] == tokenizer.encode(text).ids
    assert ids.count(image) == 64
    said = tokenizer.decode([token for token, is_answer in zip(ids, answers, strict=True) if is_answer])
    assert said.split() == ["42", "3"]
