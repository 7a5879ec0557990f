"""Search for a precision plan that keeps a budget, greedy on measured sensitivities.

The search starts with all layers in float. Each step makes the change that saves most bytes per nat
of KL divergence, which gives a path of smaller and smaller plans. For a budget, complete plans of
the path are measured on data that the sensitivities were not measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calibration.evaluation import Cost
from calibration.precision_plan import LayerPrecision, PrecisionPlan, Rule
from calibration.sensitivity import Sensitivity, SensitivityRow
from runtimes.errors import UserError

FRONT_POINTS = 8  # plans that are measured for the Pareto front
MIN_KL = 1e-12


@dataclass(frozen=True)
class Budget:
    """A limit on a plan.

    ``kl``: at most that many nats per token. ``accuracy``: at least that share of answers kept.
    ``bytes``: at most that many bytes of weights.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse ``kl=0.02``, ``accuracy=0.99`` or ``bytes=900M``.

        Raises:
            UserError: the text has another form, or its value is out of range.
        """
        kind, _, amount = text.partition("=")
        units = {"k": 1e3, "M": 1e6, "G": 1e9}
        factor = units.get(amount[-1:], 1.0) if kind == "bytes" else 1.0
        try:
            value = float(amount[:-1] if factor > 1 else amount) * factor
        except ValueError:
            value = -1.0
        if (
            kind not in ("kl", "accuracy", "bytes")
            or not 0 < value < float("inf")
            or (kind == "accuracy" and value > 1)
        ):
            raise UserError(
                f"The budget {text!r} is not valid; give one like kl=0.02, accuracy=0.99 (at most 1) or"
                " bytes=900M."
            )
        return cls(kind, value)

    def is_met(self, measured: MeasuredPlan) -> bool:
        """Return whether a measured plan keeps the budget."""
        if self.kind == "bytes":
            return measured.bytes <= self.value
        return measured.cost.kl <= self.value if self.kind == "kl" else measured.cost.kept >= self.value


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan with the bytes of its weights, its predicted KL divergence and its measured cost."""

    plan: PrecisionPlan
    bytes: int
    predicted_kl: float
    cost: Cost


Assignment = dict[str, SensitivityRow]  # layer → its precision; other layers stay in float


@dataclass(frozen=True)
class _Change:
    """A smaller precision of one layer, the bytes that it saves and the KL that it adds."""

    layer: str
    to: SensitivityRow
    saved: int
    added_kl: float

    @property
    def gain(self) -> float:
        return self.saved / max(self.added_kl, MIN_KL)


def greedy_path(sensitivity: Sensitivity) -> list[Assignment]:
    """Return assignments from all layers in float to the smallest; each has one more change."""
    layers: dict[str, list[SensitivityRow]] = {}
    for row in sensitivity.rows:
        layers.setdefault(row.layer, []).append(row)
    changes = [
        change
        for layer, rows in layers.items()
        for change in _hull_changes(layer, rows, sensitivity.floats[layer])
    ]
    # The gains of a layer's own changes decrease, so sorting keeps their order.
    changes.sort(key=lambda change: -change.gain)
    assignments: list[Assignment] = [{}]
    for change in changes:
        assignments.append({**assignments[-1], change.layer: change.to})
    return assignments


def _hull_changes(layer: str, rows: list[SensitivityRow], float_bytes: int) -> Iterator[_Change]:
    """Yield changes from float to the smallest precision along the lower convex hull of a layer."""
    size, kl = float_bytes, 0.0
    while True:
        smaller = [
            _Change(layer, row, size - row.bytes, max(row.kl - kl, 0.0)) for row in rows if row.bytes < size
        ]
        if not smaller:
            return
        best = max(smaller, key=lambda change: (change.gain, change.saved))
        yield best
        size, kl = best.to.bytes, max(best.to.kl, kl)


def build_plan(sensitivity: Sensitivity, assignment: Assignment, name: str) -> PrecisionPlan:
    """Build the plan of an assignment, with one rule per layer."""
    rules = tuple(
        Rule(layer, LayerPrecision.parse(row.precision)) for layer, row in sorted(assignment.items())
    )
    return PrecisionPlan(name, sensitivity.base, rules=rules)


class BudgetSearch:
    """Search along the greedy path of a checkpoint's sensitivities; each plan is measured once."""

    def __init__(
        self, sensitivity: Sensitivity, measure: Callable[[PrecisionPlan], Cost], name: str = "plan"
    ) -> None:
        """Compute the path.

        Args:
            sensitivity: of the checkpoint.
            measure: measures the cost of a plan on held-out data.
            name: of the plans.
        """
        self.sensitivity, self._measure_cost, self._name = sensitivity, measure, name
        self.path = greedy_path(sensitivity)
        self._measured: dict[int, MeasuredPlan] = {}

    @property
    def measured_plans(self) -> list[MeasuredPlan]:
        """All measured plans, the largest first."""
        return [self._measured[index] for index in sorted(self._measured)]

    def measure(self, index: int) -> MeasuredPlan:
        """Measure a plan by its index in the path, unless that was done before."""
        if index not in self._measured:
            assignment = self.path[index]
            plan = build_plan(self.sensitivity, assignment, self._name)
            predicted = sum(row.kl for row in assignment.values())
            cost = self._measure_cost(plan)
            self._measured[index] = MeasuredPlan(plan, self.total_bytes(assignment), predicted, cost)
        return self._measured[index]

    def total_bytes(self, assignment: Assignment) -> int:
        """Return the bytes of all layers' weights."""
        floats = self.sensitivity.floats
        return sum(assignment[layer].bytes if layer in assignment else size for layer, size in floats.items())

    def find_best(self, budget: Budget) -> MeasuredPlan:
        """Find the smallest plan for a budget of quality, or the largest for a budget of bytes.

        Raises:
            UserError: no plan of the path keeps the budget.
        """
        if budget.kind == "bytes":
            for index, assignment in enumerate(self.path):
                if self.total_bytes(assignment) <= budget.value:
                    return self.measure(index)
            least = self.total_bytes(self.path[-1])
            raise UserError(
                f"The smallest plan takes {least} bytes of weights; give a budget of at least that many,"
                f" not {budget.value:.0f}."
            )
        low, high = 0, len(self.path) - 1
        while low < high:  # the cost grows along the path, but for measurement noise
            middle = (low + high + 1) // 2
            low, high = (middle, high) if budget.is_met(self.measure(middle)) else (low, middle - 1)
        while low and not budget.is_met(self.measure(low)):
            low -= 1
        if not budget.is_met(self.measure(low)):
            raise UserError(
                f"Not even all layers in {self.sensitivity.base} keep the budget"
                f" {budget.kind}={budget.value:g}; give a larger one."
            )
        return self.measure(low)

    def measure_front(self) -> list[MeasuredPlan]:
        """Measure plans at ``FRONT_POINTS`` sizes along the path; returns all measured plans."""
        sizes = [self.total_bytes(assignment) for assignment in self.path]
        for point in range(FRONT_POINTS):
            limit = sizes[-1] + (sizes[0] - sizes[-1]) * (point / (FRONT_POINTS - 1)) ** 2
            self.measure(next(index for index, size in enumerate(sizes) if size <= limit))
        return self.measured_plans
