"""The result of a parity check: stages, tokens, localization, and the verdict that follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from dsvl_export.parity_check.metrics import Errors, LogitAgreement
from dsvl_export.parity_check.tolerances import ComponentTolerance
from runtimes.bundle.mixes import COMPONENTS
from runtimes.session import Execution

STAGES = (
    "text", "preprocess", "vision_encoder", "adaptor", "prefill_logits", "teacher_forced_logits",
    "long_context", "greedy_tokens", "entry_points", "task_accuracy", "layers", "audit",
)  # fmt: skip
# The stages that judge a component by itself.
STAGES_OF = {
    "vision_encoder": ("vision_encoder",),
    "adaptor": ("adaptor",),
    "decoder": ("prefill_logits", "teacher_forced_logits"),
}
# Stages that need what not every bundle has: questions, entry points of the format, layers that run
# one by one, or files that ``export`` can audit.
OPTIONAL = ("entry_points", "task_accuracy", "layers", "audit")
EXIT_CODES = {"passed": 0, "failed": 1, "not judged": 3}
# ``measured``: the stage ran, and there is nothing to compare it with.
State = Literal["passed", "failed", "measured", "not judged", "not run"]


@dataclass
class StageResult:
    """The result of one stage over all goldens."""

    name: str
    state: State = "not run"
    errors: Errors | None = None
    logits: LogitAgreement | None = None
    detail: str = ""

    def compare(
        self,
        golden: int,
        tensor: str,
        actual: np.ndarray,
        expected: np.ndarray,
        bound: float,
        quantization_error: float | None = None,
        channel_bound: float | None = None,
    ) -> None:
        """Judge the relative RMS error of one tensor; a wrong shape, NaN or infinity fails.

        Args:
            golden: number of the golden.
            tensor: name of the tensor.
            actual: what the artifact computes.
            expected: what the reference computes, of the same shape.
            bound: largest relative RMS error of the tensor.
            quantization_error: relative RMS error of the reference at this precision, for the
                report.
            channel_bound: largest error of a channel; None is ``CHANNEL_FACTOR`` times ``bound``.
        """
        if actual.shape != expected.shape:
            self.fail(f"{tensor} is {list(actual.shape)}, expected {list(expected.shape)}")
            return
        self.errors = self.errors or Errors()
        within = self.errors.add(golden, tensor, actual, expected, bound, quantization_error, channel_bound)
        if not np.isfinite(actual).all():
            self.fail(f"NaN or infinity in {tensor} of golden {golden}")
        elif not within:
            single = self.errors.relative_rms <= self.errors.bound
            self.fail(f"a single channel of {tensor} is wrong in golden {golden}" if single else "")
        else:
            self.passed()

    def compare_top1(self, golden: int, actual: np.ndarray, expected: np.ndarray, tie_error: float) -> None:
        """Judge the top-1 tokens of ``[K, V]`` logits: they must agree except for near ties."""
        if actual.shape != expected.shape:
            return
        self.logits = self.logits or LogitAgreement()
        if self.logits.add(actual, expected, tie_error):
            self.fail(f"golden {golden} has another most probable token, and it is not a near tie")

    def passed(self) -> None:
        """Set the state to ``passed``, unless the stage failed before."""
        self.state = "failed" if self.state == "failed" else "passed"

    def fail(self, detail: str) -> None:
        """Set the state to ``failed``; the detail of the first failure is kept."""
        if self.state != "failed" or not self.detail:
            self.detail = detail
        self.state = "failed"


@dataclass(frozen=True)
class TokenComparison:
    """Greedy tokens of one golden through all components, from the image file on.

    ``diverges_at`` is the first step that differs. ``margin`` is the difference there between the
    reference's logits of its own token and of the backend's.
    """

    golden: int
    images: tuple[str, ...]
    prompt: str
    expected: list[int]
    actual: list[int]
    expected_pieces: list[str]
    actual_pieces: list[str]
    diverges_at: int | None = None
    near_tie: bool = False
    margin: float = 0.0


@dataclass(frozen=True)
class TapError:
    """Relative RMS error of one tap, its bound, and the reference's error at this precision."""

    name: str
    relative_rms: float
    bound: float
    quantization_error: float | None


@dataclass(frozen=True)
class Localization:
    """Where a component diverges from the reference: errors of its taps in order of execution.

    ``first`` is the first tap beyond its bound, None if all lie within. ``note`` says why there are
    no taps, or what it means that none lies beyond its bound.
    """

    component: str
    taps: tuple[TapError, ...]
    first: str | None
    note: str = ""

    def __str__(self) -> str:
        """Return one line: the component, the first divergent tap and its error, or the note."""
        if self.first is None:
            return f"{self.component}: {self.note}"
        index = [tap.name for tap in self.taps].index(self.first)
        tap, previous = self.taps[index], self.taps[max(index - 1, 0)]
        text = f"{self.component}: {tap.name} is the first tap beyond its bound ({tap.relative_rms:.1e}"
        before = f", {previous.relative_rms:.1e} in the tap before" if index else ""
        return f"{text}, bound {tap.bound:.1e}{before})"


@dataclass(frozen=True)
class TaskResult:
    """Exact match on questions, compared with fp32 by MLPerf's rule.

    ``baseline`` names what gave the fp32 answers, None if there are none.
    """

    questions: int
    right: int
    by_kind: dict[str, float]
    mean_tokens: float
    baseline: str | None
    baseline_right: int | None
    baseline_mean_tokens: float | None
    wrong: list[dict[str, Any]]

    @property
    def exact_match(self) -> float:
        """Share of the questions that are answered correctly."""
        return self.right / self.questions

    @property
    def accuracy_ratio(self) -> float | None:
        """Correct answers relative to fp32's; 1 if there are as many. None without fp32 answers."""
        return self.right / self.baseline_right if self.baseline_right else None

    @property
    def length_ratio(self) -> float | None:
        """Mean tokens per answer relative to fp32's; None without fp32 answers."""
        return self.mean_tokens / self.baseline_mean_tokens if self.baseline_mean_tokens else None


@dataclass
class ParityResult:
    """The verdict on one backend and precision, with everything that it depends on.

    ``reference`` names what the artifacts were compared with. ``left_out`` counts the goldens that
    the decoder's KV cache is too short for. ``tolerances`` are those of each component, empty if
    nothing is judged. ``overridden`` says that they are not the shipped ones. ``is_fp32`` says that
    all components are in fp32.
    """

    backend: str
    precision: str
    execution: Execution
    reference: str
    goldens: int = 0
    left_out: int = 0
    is_fp32: bool = False
    tolerances: dict[str, ComponentTolerance] = field(default_factory=dict)
    overridden: bool = False
    stages: list[StageResult] = field(default_factory=lambda: [StageResult(name) for name in STAGES])
    tokens: list[TokenComparison] = field(default_factory=list)
    localizations: list[Localization] = field(default_factory=list)
    task: TaskResult | None = None

    def stage(self, name: str) -> StageResult:
        """Return the result of a stage."""
        return self.stages[STAGES.index(name)]

    def bound(self, stage: str, measured: float | None) -> float:
        """Return the largest relative RMS error of a stage; see ``Tolerance.bound``."""
        return self.tolerances[_component_of(stage) or COMPONENTS[0]].own.bound(stage, measured)

    def tie_error(self, stage: str, measured: float) -> float:
        """Return the relative error of logits up to which a changed top-1 token is a near tie.

        Args:
            stage: the stage that judges the logits.
            measured: the error of the reference at this precision.
        """
        component = _component_of(stage)
        judged = [self.tolerances[component]] if component else self.tolerances.values()
        rows = [tolerance.own for tolerance in judged]
        return max(row.tie_factor * max(row.quantization_error, measured) for row in rows)

    def advise_on_overflow(self) -> None:
        """Add what to do to each stage in which half precision gives NaN or infinity."""
        for stage in self.stages:
            if "NaN or infinity" in stage.detail:
                stage.detail += "; if it overflows, export with another base precision, bf16 or fp32"

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` or ``not judged``; nothing passes that was not executed."""
        states = {stage.state for stage in self.stages}
        if "failed" in states:
            return "failed"
        unjudged = any(stage.state == "not run" for stage in self.stages if stage.name not in OPTIONAL)
        if not self.execution.runnable or unjudged or "not judged" in states:
            return "not judged"
        return "passed"

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``passed``."""
        return self.verdict == "passed"

    @property
    def exit_code(self) -> int:
        """Exit code of the command line for the verdict."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON; NaN and infinity, which JSON does not have, become null."""
        raw = asdict(self)
        del raw["is_fp32"]
        raw["tolerances"] = {name: row["own"] for name, row in raw["tolerances"].items()}
        for stage, row in zip(self.stages, raw["stages"], strict=True):
            if stage.errors:
                row["errors"]["snr_db"] = stage.errors.snr_db
        if self.task:
            for name in ("exact_match", "accuracy_ratio", "length_ratio"):
                raw["task"][name] = getattr(self.task, name)
        return {"verdict": self.verdict, **_finite(raw)}


def _component_of(stage: str) -> str | None:
    """Return the component that a stage judges by itself; None if it judges several."""
    return next((component for component, stages in STAGES_OF.items() if stage in stages), None)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
