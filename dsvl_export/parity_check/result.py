"""What the ladder found: rungs, tokens, drift, and the verdict that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from dsvl_export.parity_check.metrics import Errors, LogitAgreement
from dsvl_export.parity_check.tolerances import Tolerance
from runtimes.session import Execution

RUNGS = (
    "text", "preprocess", "vision_encoder", "adaptor", "prefill_logits", "teacher_forced_logits",
    "long_context", "greedy_tokens", "entry_points", "task_accuracy", "layers", "audit",
)  # fmt: skip
# Not every model has questions, nor every format entry points of its own, layers that run alone, or files
# that export can compare with the checkpoint.
OPTIONAL = ("entry_points", "task_accuracy", "layers", "audit")
EXIT_CODES = {"passed": 0, "failed": 1, "not judged": 3}
# ``measured``: it ran, and there is nothing to hold it against.
State = Literal["passed", "failed", "measured", "not judged", "not run"]


@dataclass
class Rung:
    """One stage over all goldens."""

    name: str
    state: State = "not run"
    errors: Errors | None = None
    logits: LogitAgreement | None = None
    detail: str = ""

    def compare(
        self,
        golden: int,
        tensor: str,
        found: np.ndarray,
        expected: np.ndarray,
        bound: float,
        noise: float | None = None,
        channel_bound: float | None = None,
    ) -> None:
        """Judge the relative RMS error of one tensor; a wrong shape, NaN or infinity fails."""
        if found.shape != expected.shape:
            self.fail(f"{tensor} is {list(found.shape)}, expected {list(expected.shape)}")
            return
        self.errors = self.errors or Errors()
        within = self.errors.add(golden, tensor, found, expected, bound, noise, channel_bound)
        if not np.isfinite(found).all():
            self.fail(f"NaN or infinity in {tensor} of golden {golden}")
        elif not within:
            alone = self.errors.relative_rms <= self.errors.bound
            self.fail(f"a single channel of {tensor} is wrong in golden {golden}" if alone else "")
        else:
            self.passed()

    def compare_choices(self, golden: int, found: np.ndarray, expected: np.ndarray, noise: float) -> None:
        """Judge the first choices of ``[K, V]`` logits: they must agree but for ties within the noise."""
        if found.shape != expected.shape:
            return
        self.logits = self.logits or LogitAgreement()
        if self.logits.add(found, expected, noise):
            self.fail(f"golden {golden} has another first choice, and it is no near tie")

    def passed(self) -> None:
        self.state = "failed" if self.state == "failed" else "passed"

    def fail(self, detail: str) -> None:
        """The first failure's detail stays; it takes the place of a mere remark."""
        if self.state != "failed" or not self.detail:
            self.detail = detail
        self.state = "failed"


@dataclass(frozen=True)
class TokenComparison:
    """Greedy tokens of one golden through the whole chain, from the image file on.

    ``diverges_at`` is the first differing step, ``margin`` the reference's own margin there between
    its choice and the backend's.
    """

    golden: int
    images: tuple[str, ...]
    prompt: str
    expected: list[int]
    found: list[int]
    expected_pieces: list[str]
    found_pieces: list[str]
    diverges_at: int | None = None
    near_tie: bool = False
    margin: float = 0.0


@dataclass(frozen=True)
class TapError:
    """Error of one tap, and the band that it should lie in."""

    name: str
    relative_rms: float
    band: float
    noise: float | None


@dataclass(frozen=True)
class Drift:
    """Where a component leaves the reference: errors of its taps in order of execution.

    ``first`` is the first tap outside its band, None where all lie inside; ``note`` says why there are
    no taps, or what it means that none left its band.
    """

    component: str
    taps: tuple[TapError, ...]
    first: str | None
    note: str = ""

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.component}: {self.note}"
        index = [tap.name for tap in self.taps].index(self.first)
        tap, before = self.taps[index], self.taps[max(index - 1, 0)]
        text = f"{self.component}: {tap.name} is the first to leave its band ({tap.relative_rms:.1e}"
        return f"{text}, band {tap.band:.1e}{f', {before.relative_rms:.1e} before it' if index else ''})"


@dataclass(frozen=True)
class TaskResult:
    """Exact match on questions, held against fp32's by MLPerf's rule.

    ``baseline`` names whose accuracy and length the others are compared with, None without any.
    ``accuracy_ratio`` is 1 where as many are right; ``length_ratio`` compares mean tokens per answer.
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
        return self.right / self.questions

    @property
    def accuracy_ratio(self) -> float | None:
        return self.right / self.baseline_right if self.baseline_right else None

    @property
    def length_ratio(self) -> float | None:
        return self.mean_tokens / self.baseline_mean_tokens if self.baseline_mean_tokens else None


@dataclass
class ParityResult:
    """The verdict on one backend and precision, and all that it rests on."""

    backend: str
    precision: str
    execution: Execution
    reference: str  # what it was compared with
    goldens: int = 0
    left_out: int = 0  # goldens that the decoder's KV cache is too short for
    tolerance: Tolerance | None = None
    overridden: bool = False  # the tolerance is not the shipped one
    rungs: list[Rung] = field(default_factory=lambda: [Rung(name) for name in RUNGS])
    tokens: list[TokenComparison] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    task: TaskResult | None = None

    def rung(self, name: str) -> Rung:
        return self.rungs[RUNGS.index(name)]

    def bound(self, rung: str, measured_noise: float | None) -> float:
        assert self.tolerance
        return self.tolerance.bound(rung, measured_noise)

    def tie_noise(self, measured_noise: float) -> float:
        """The noise below which a changed first choice is a tie."""
        assert self.tolerance
        return self.tolerance.tie_factor * max(self.tolerance.noise, measured_noise)

    def advise_on_overflow(self) -> None:
        """Say what to do where half precision gives NaN or infinity."""
        for rung in self.rungs:
            if "NaN or infinity" in rung.detail:
                rung.detail += "; if it overflows, export with another base precision, bf16 or fp32"

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` or ``not judged``; nothing passes that has not been executed."""
        states = {rung.state for rung in self.rungs}
        if "failed" in states:
            return "failed"
        unjudged = any(rung.state == "not run" for rung in self.rungs if rung.name not in OPTIONAL)
        if not self.execution.runnable or unjudged or "not judged" in states:
            return "not judged"
        return "passed"

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity: both become null."""
        raw = asdict(self)
        for rung, row in zip(self.rungs, raw["rungs"], strict=True):
            if rung.errors:
                row["errors"]["snr_db"] = rung.errors.snr_db
        if self.task:
            for name in ("exact_match", "accuracy_ratio", "length_ratio"):
                raw["task"][name] = getattr(self.task, name)
        return {"verdict": self.verdict, **_finite(raw)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
