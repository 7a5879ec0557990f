"""The last rung: task accuracy against fp32's, by MLPerf's rule.

MLPerf Inference asks of a quantized model at least 99 % (or 99.9 %) of the fp32 model's accuracy and,
for language models, answers of the same length within 10 % (mlcommons/inference_policies).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from dsvl_export.cluster.ray_cluster import Spread
from dsvl_export.parity_check.result import ParityResult, TaskResult
from runtimes.goldens.task import TaskItem, TaskScore, run_task
from runtimes.pipeline import Pipeline

KEPT_WRONG = 20
PART = 25  # questions that a machine is given at a time


def judge_task(
    score: TaskScore,
    result: ParityResult,
    baseline: tuple[str, TaskScore] | None,
) -> None:
    """Fill the result's task rung.

    Args:
        score: of the answers to judge.
        baseline: who gave the fp32 answers, and their score; without it only fp32 itself is measured,
            another precision cannot be judged.
    """
    assert result.tolerance
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
            for item, answer in score.incorrect[:KEPT_WRONG]
        ],
    )  # fmt: skip
    rung = result.rung("task_accuracy")
    if task.accuracy_ratio is not None and task.length_ratio is not None:
        right = task.accuracy_ratio >= result.tolerance.task_accuracy
        long = abs(task.length_ratio - 1) <= result.tolerance.generated_length + 1e-9
        rung.state = "passed" if right and long else "failed"
        rung.detail = (
            f"{task.accuracy_ratio:.1%} of the accuracy and {task.length_ratio:.1%} of the answer length of"
            f" {task.baseline}; MLPerf's 99.9 % {'is met' if task.accuracy_ratio >= 0.999 else 'is not met'}"
        )
    elif reference:
        rung.state, rung.detail = "not judged", f"{name} answers nothing right, so there is nothing to keep"
    elif result.precision == "fp32":
        rung.state, rung.detail = "measured", "fp32 is the baseline of the others"
    else:
        rung.state = "not judged"
        rung.detail = "no fp32 answers to compare with: export fp32 as well, or give --live CHECKPOINT"


def counted(
    pipeline: Pipeline, items: list[TaskItem], name: str, on_step: Callable[[str, int, int], None]
) -> TaskScore:
    """``run_task`` with its progress reported under a name."""
    done = 0

    def on_item() -> None:
        nonlocal done
        done += 1
        on_step(name, done, len(items))

    return run_task(pipeline, items, on_item)


def counted_spread(
    where: tuple[str, str, str, int | None, str | None],
    items: list[TaskItem],
    name: str,
    on_step: Callable[[str, int, int], None],
    spread: Spread,
) -> TaskScore:
    """``counted`` with parts of the questions asked on other machines.

    Args:
        where: the bundle's folder, backend, precision, threads and device.
    """
    parts = [items[start : start + PART] for start in range(0, len(items), PART)]
    scores: dict[int, TaskScore] = {}
    for index, score in spread(score_of, [(*where, part) for part in parts]):
        scores[index] = score
        on_step(name, sum(len(each.tokens) for each in scores.values()), len(items))
    whole = TaskScore()
    for index in sorted(scores):
        whole.merge(scores[index])
    return whole


def score_of(
    folder: str, backend: str, precision: str, threads: int | None, device: str | None, items: list[TaskItem]
) -> TaskScore:
    """The answers to some questions, on the machine that this runs on."""
    return run_task(_pipeline_here(folder, backend, precision, threads, device), items, lambda: None)


@cache
def _pipeline_here(
    folder: str, backend: str, precision: str, threads: int | None, device: str | None
) -> Pipeline:
    return Pipeline.open(folder, backend, precision, threads=threads, device=device)
