"""Generator of the held-out set: ``python -m reference.tiny.heldout`` (500 questions, fixed seeds).

Training never uses the fonts and positions of these pictures. The pictures are stored, so that
accuracy does not depend on the machine's fonts or FreeType. ``--answers`` keeps the set and records
the answers of the fp32 reference with the current weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from reference.tiny import HELDOUT
from reference.tiny.pictures import Scene, draw_scene
from reference.tiny.questions import HELD_OUT_KINDS, Question, image_preamble, make_question
from runtimes.goldens.task import TaskItem, TaskScore, load_task, run_task
from runtimes.pipeline import Pipeline

QUESTION_COUNT = 500
SEED = 2403_05525


def make_held_out_rows(folder: Path) -> list[dict[str, Any]]:
    """Draw the pictures into ``folder / images`` and return one row per question.

    The kinds alternate. One question in six is about one of two pictures; one in seven of the
    others is the second turn of a chat.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    rows: list[dict[str, Any]] = []
    picture = 0
    while len(rows) < QUESTION_COUNT:
        count = 2 if rng.random() < 1 / 6 else 1
        names = ["the picture"] if count == 1 else ["Figure 1", "Figure 2"]
        drawn = [draw_scene((SEED, picture + index), held_out=True) for index in range(count)]
        scenes = [scene for _, scene in drawn]
        which = int(rng.integers(count))
        question = make_question(
            rng, HELD_OUT_KINDS[len(rows) % len(HELD_OUT_KINDS)], scenes[which], names[which]
        )
        picture += count
        if question is None:  # the scene has no such question; try the next picture
            continue
        files = []
        for index, (image, _) in enumerate(drawn):
            files.append(f"images/{picture - count + index:04}.png")
            image.save(folder / files[-1], optimize=True)
        rows.append(_make_row(rng, question, scenes, files))
    return rows


def _make_row(
    rng: np.random.Generator, question: Question, scenes: list[Scene], files: list[str]
) -> dict[str, Any]:
    history = []
    text, first = question.text, image_preamble(len(files))
    if len(files) == 1 and rng.random() < 1 / 7:
        kinds = [kind for kind in HELD_OUT_KINDS[:-1] if kind != question.kind]
        before = next(
            q
            for kind in rng.permutation(kinds)
            if (q := make_question(rng, str(kind), scenes[0], "the picture"))
        )
        history = [{"role": "user", "content": first + before.text},
                   {"role": "assistant", "content": before.answer}]  # fmt: skip
    else:
        text = first + text
    return {"kind": question.kind, "images": files, "history": history, "question": text,
            "expected": question.answer}  # fmt: skip


def answer_with_reference(items: list[TaskItem]) -> TaskScore:
    """Answer the questions with the fp32 reference and the bundled weights."""
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.session import reference_chain, write_token_embedding

    checkpoint = open_checkpoint("tiny")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.safetensors"
        write_token_embedding(checkpoint, table)
        chain = reference_chain(checkpoint, table)
        pipeline = Pipeline(
            chain, chain.tokenizer.spec.system_prompt, checkpoint.config.decoder.max_positions
        )
        return run_task(pipeline, items, lambda: None)


def main() -> None:
    """Write the held-out set, or with ``--answers`` the reference's answers."""
    if sys.argv[1:] == ["--answers"]:
        rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
        score = answer_with_reference(load_task(HELDOUT))
        for row, answer, tokens in zip(rows, score.answers, score.tokens, strict=True):
            row.update(reference=answer, reference_tokens=tokens)
    else:
        rows = make_held_out_rows(HELDOUT.parent)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    HELDOUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
