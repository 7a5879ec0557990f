"""The stage ``task_accuracy``: exact match on questions, compared with fp32 by MLPerf's rule.

MLPerf Inference requires at least 99 % (or 99.9 %) of the fp32 model's accuracy from a quantized
model and, from language models, answers of the same length within 10 %
(https://github.com/mlcommons/inference_policies).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from dsvl_export.cluster.ray_cluster import Spread
from dsvl_export.parity_check.result import ParityResult, TaskResult
from runtimes.goldens.task import TaskItem, TaskScore, run_task
from runtimes.pipeline import Pipeline

MAX_WRONG_ANSWERS = 20  # in the report
PART = 25  # questions in one task of the cluster
OnStep = Callable[[str, int, int], None]


def judge_task(
    score: TaskScore,
    result: ParityResult,
    baseline: tuple[str, TaskScore] | None,
) -> None:
    """Fill in the stage ``task_accuracy``.

    Args:
        score: of the answers to judge.
        result: the result to fill in.
        baseline: name of what gave the fp32 answers, and their score. Without it, fp32 itself is
            ``measured``, and any other precision is ``not judged``.
    """
    rows = [tolerance.own for tolerance in result.tolerances.values()]
    name, reference = baseline or (None, None)
    result.task = task = TaskResult(
        questions=score.questions.total(),
        right=score.correct.total(),
        by_kind=score.by_kind(),
        mean_tokens=score.mean_tokens,
        baseline=name,
        baseline_right=reference.correct.total() if reference else None,
        baseline_mean_tokens=reference.mean_tokens if reference else None,
        wrong=[
            {"images": [str(path) for path in item.images], "question": item.messages[-1].content,
             "expected": item.expected, "answer": answer}
            for item, answer in score.incorrect[:MAX_WRONG_ANSWERS]
        ],
    )  # fmt: skip
    stage = result.stage("task_accuracy")
    if task.accuracy_ratio is not None and task.length_ratio is not None:
        accurate = task.accuracy_ratio >= min(row.task_accuracy for row in rows)
        longest = max(row.generated_length for row in rows)
        same_length = abs(task.length_ratio - 1) <= longest + 1e-9
        stage.state = "passed" if accurate and same_length else "failed"
        stage.detail = (
            f"{task.accuracy_ratio:.1%} of the accuracy and {task.length_ratio:.1%} of the answer length of"
            f" {task.baseline}; MLPerf's 99.9 % {'is met' if task.accuracy_ratio >= 0.999 else 'is not met'}"
        )
    elif reference:
        stage.state = "not judged"
        stage.detail = f"{name} answers no question correctly, so there is no accuracy to compare with"
    elif result.is_fp32:
        stage.state, stage.detail = "measured", "fp32 is the baseline of the other precisions"
    else:
        stage.state = "not judged"
        stage.detail = "no fp32 answers to compare with: export fp32 as well, or pass --live CHECKPOINT"


def score_with_progress(pipeline: Pipeline, items: list[TaskItem], name: str, on_step: OnStep) -> TaskScore:
    """Answer questions and report the progress to ``on_step`` under ``name``."""
    done = 0

    def on_item() -> None:
        nonlocal done
        done += 1
        on_step(name, done, len(items))

    return run_task(pipeline, items, on_item)


def score_on_cluster(
    model: tuple[str, str, str, int | None, str | None],
    items: list[TaskItem],
    name: str,
    on_step: OnStep,
    spread: Spread,
) -> TaskScore:
    """Answer questions on the machines of a cluster; otherwise as ``score_with_progress``.

    Args:
        model: folder of the bundle, backend, precision, threads and device.
        items: the questions.
        name: name of the step for ``on_step``.
        on_step: called with the name, the questions done and all questions.
        spread: runs the parts on the cluster.
    """
    parts = [items[start : start + PART] for start in range(0, len(items), PART)]
    scores: dict[int, TaskScore] = {}
    for index, score in spread(score_questions, [(*model, part) for part in parts]):
        scores[index] = score
        on_step(name, sum(len(part.tokens) for part in scores.values()), len(items))
    total = TaskScore()
    for index in sorted(scores):
        total.merge(scores[index])
    return total


def score_questions(
    folder: str, backend: str, precision: str, threads: int | None, device: str | None, items: list[TaskItem]
) -> TaskScore:
    """Answer questions in this process, with a pipeline that it keeps open."""
    return run_task(_open_pipeline(folder, backend, precision, threads, device), items, lambda: None)


@cache
def _open_pipeline(
    folder: str, backend: str, precision: str, threads: int | None, device: str | None
) -> Pipeline:
    return Pipeline.open(folder, backend, precision, threads=threads, device=device)
