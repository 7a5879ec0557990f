"""A precision for every layer that keeps a budget: greedy on measured sensitivity, verified, repaired.

From all layers in float, the move that saves most bytes per nat of KL divergence is made first, and so on;
what is passed on the way is a path of ever smaller plans. A budget picks a place on it by measuring whole
plans on data that the sensitivities have not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calibration.evaluation import Cost
from calibration.precision_plan import LayerPrecision, PrecisionPlan, Rule
from calibration.sensitivity import Row, Sensitivity
from runtimes.errors import UserError

FRONT = 8  # plans that are measured to draw the front
LEAST_KL = 1e-12


@dataclass(frozen=True)
class Budget:
    """``kl``: nats per token at most; ``accuracy``: share of answers kept at least; ``bytes``: at most."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From ``kl=0.02``, ``accuracy=0.99`` or ``bytes=900M``.

        Raises:
            UserError: it is nothing of that kind.
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
                f"The budget {text!r} is none of kl=0.02, accuracy=0.99 (at most 1) or bytes=900M."
            )
        return cls(kind, value)

    def holds(self, point: Point) -> bool:
        if self.kind == "bytes":
            return point.bytes <= self.value
        return point.cost.kl <= self.value if self.kind == "kl" else point.cost.kept >= self.value


@dataclass(frozen=True)
class Point:
    """A plan that was measured: bytes of its layers' weights, its predicted and its true cost."""

    plan: PrecisionPlan
    bytes: int
    predicted_kl: float
    cost: Cost


Assignment = dict[str, Row]  # layer → what it was given; layers that are not in it stay in float


@dataclass(frozen=True)
class _Move:
    layer: str
    to: Row
    saved: int
    added_kl: float

    @property
    def gain(self) -> float:
        return self.saved / max(self.added_kl, LEAST_KL)


def path(sensitivity: Sensitivity) -> list[Assignment]:
    """Assignments from all in float to the smallest there is, each with one move more."""
    layers: dict[str, list[Row]] = {}
    for row in sensitivity.rows:
        layers.setdefault(row.layer, []).append(row)
    moves = [
        move for layer, rows in layers.items() for move in _moves(layer, rows, sensitivity.floats[layer])
    ]
    # A layer's own moves have falling gains, so they come in order.
    moves.sort(key=lambda move: -move.gain)
    steps: list[Assignment] = [{}]
    for move in moves:
        steps.append({**steps[-1], move.layer: move.to})
    return steps


def _moves(layer: str, rows: list[Row], float_bytes: int) -> Iterator[_Move]:
    """From float along the lower convex hull of a layer's choices, to its smallest."""
    size, kl = float_bytes, 0.0
    while True:
        smaller = [
            _Move(layer, row, size - row.bytes, max(row.kl - kl, 0.0)) for row in rows if row.bytes < size
        ]
        if not smaller:
            return
        best = max(smaller, key=lambda move: (move.gain, move.saved))
        yield best
        size, kl = best.to.bytes, max(best.to.kl, kl)


def as_plan(sensitivity: Sensitivity, assignment: Assignment, name: str) -> PrecisionPlan:
    """The plan of an assignment, a rule for each layer."""
    rules = tuple(
        Rule(layer, LayerPrecision.parse(row.precision)) for layer, row in sorted(assignment.items())
    )
    return PrecisionPlan(name, sensitivity.base, rules=rules)


class Planner:
    """Measures plans of a path, each once.

    Args:
        measure: the true cost of a plan, on held-out data.
    """

    def __init__(
        self, sensitivity: Sensitivity, measure: Callable[[PrecisionPlan], Cost], name: str = "plan"
    ) -> None:
        self.sensitivity, self._measure, self._name = sensitivity, measure, name
        self.path = path(sensitivity)
        self._points: dict[int, Point] = {}

    @property
    def points(self) -> list[Point]:
        """All that was measured, the largest first."""
        return [self._points[index] for index in sorted(self._points)]

    def point(self, index: int) -> Point:
        if index not in self._points:
            assignment = self.path[index]
            plan = as_plan(self.sensitivity, assignment, self._name)
            predicted = sum(row.kl for row in assignment.values())
            self._points[index] = Point(plan, self.bytes(assignment), predicted, self._measure(plan))
        return self._points[index]

    def bytes(self, assignment: Assignment) -> int:
        floats = self.sensitivity.floats
        return sum(assignment[layer].bytes if layer in assignment else size for layer, size in floats.items())

    def best(self, budget: Budget) -> Point:
        """The smallest plan that keeps a budget of quality, or the best that keeps one of bytes.

        Raises:
            UserError: no plan keeps it.
        """
        if budget.kind == "bytes":
            for index, assignment in enumerate(self.path):
                if self.bytes(assignment) <= budget.value:
                    return self.point(index)
            least = self.bytes(self.path[-1])
            raise UserError(
                f"The smallest plan takes {least} bytes of weights, {budget.value:.0f} are not possible."
            )
        low, high = 0, len(self.path) - 1
        while low < high:  # the cost grows along the path, but for noise
            middle = (low + high + 1) // 2
            low, high = (middle, high) if budget.holds(self.point(middle)) else (low, middle - 1)
        while low and not budget.holds(self.point(low)):
            low -= 1
        if not budget.holds(self.point(low)):
            raise UserError(
                f"Not even all layers in {self.sensitivity.base} keep the budget {budget.value:g}."
            )
        return self.point(low)

    def front(self) -> list[Point]:
        """Points spread over the bytes of the path, with all that was measured before."""
        sizes = [self.bytes(assignment) for assignment in self.path]
        for share in range(FRONT):
            wanted = sizes[-1] + (sizes[0] - sizes[-1]) * (share / (FRONT - 1)) ** 2
            self.point(next(index for index, size in enumerate(sizes) if size <= wanted))
        return self.points
