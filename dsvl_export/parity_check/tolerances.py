"""The tolerances of each precision: ``tolerances.yaml``, which a file of the user can override."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError

TABLE = Path(__file__).parent / "tolerances.yaml"
BOUNDED_STAGES = (
    "preprocess", "vision_encoder", "adaptor", "prefill_logits", "teacher_forced_logits",
    "long_context",
)  # fmt: skip
FLOATS = ("fp32", "fp16", "bf16")
LONG_STAGE = BOUNDED_STAGES[-1]
PLAN_MARGIN = 3  # factor on the usual bound of a float precision: other inputs, more roundings
# Keys of 0.4 in files of users, and their names now.
RENAMED = {"noise": "quantization_error", "drift_factor": "tap_factor", "rungs": "stages"}


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one precision; ``tolerances.yaml`` defines each and says where it comes from."""

    quantization_error: float
    factor: float
    ceiling: float
    floor: float
    tap_factor: float
    tie_factor: float
    task_accuracy: float
    generated_length: float
    plan_share: float = 0.35
    layer_floor: float = 0.0
    layer_share: float = 0.0
    layer_row_share: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)

    def bound(self, stage: str, measured: float | None = None) -> float:
        """Return the largest relative RMS error of a stage.

        Preprocessing must be equal bit for bit.

        Args:
            stage: name of the stage.
            measured: quantization error of the reference at this stage for one golden, if it was
                measured.
        """
        if stage in self.stages or stage == "preprocess":
            return self.stages.get(stage, 0.0)
        usual = self.quantization_error * self.factor
        return max(usual, min((measured or 0.0) * self.factor, self.ceiling))

    def plan_bound(self, base: Tolerance, error: float) -> float:
        """Return the largest relative RMS error from what the precision plan computes in PyTorch.

        Args:
            base: tolerance of the float precision that the plan is based on; it may be this one.
            error: relative RMS error of the plan from fp32.
        """
        share = self.plan_share + (base.plan_share if base is not self else 0)
        return PLAN_MARGIN * base.quantization_error * base.factor + share * error

    def tap_bound(self, measured: float | None) -> float:
        """Return the largest relative RMS error of a tap, given its measured quantization error."""
        return self.tap_factor * max(measured or 0.0, self.floor)

    def layer_bounds(self, error: float) -> tuple[float, float]:
        """Return the largest relative RMS errors of a layer on its recorded input.

        The first is that of all rows, the second that of the median row.

        Call it on the tolerance of the base of the precision.

        Args:
            error: quantization error of that layer alone, relative RMS.
        """
        return self.layer_floor + self.layer_share * error, self.layer_floor + self.layer_row_share * error

    def plus(self, other: Tolerance) -> Tolerance:
        """Return the tolerance for comparing two artifacts: the sum of the bounds of both."""
        coarser = max(self, other, key=lambda tolerance: tolerance.quantization_error * tolerance.factor)
        return replace(
            coarser,
            quantization_error=(
                self.quantization_error * self.factor + other.quantization_error * other.factor
            )
            / max(coarser.factor, 1e-30),
            ceiling=self.ceiling + other.ceiling,
            floor=self.floor + other.floor,
            stages={stage: self.bound(stage) + other.bound(stage) for stage in {*self.stages, *other.stages}},
        )


@dataclass(frozen=True)
class ComponentTolerance:
    """The tolerances of a component: of its precision, and of the precision's base.

    The base is the float precision of the layers that are not quantized. A float precision is its
    own base.
    """

    own: Tolerance
    base: Tolerance

    def plan_bound(self, error: float) -> float:
        """Return the largest relative RMS error from what the plan computes in PyTorch.

        Args:
            error: relative RMS error of the plan from fp32.
        """
        return self.own.plan_bound(self.base, error)

    def long_bound(self, error: float) -> float:
        """Return the bound of the long golden: ``plan_bound``, unless its stage has one."""
        return self.own.stages[LONG_STAGE] if LONG_STAGE in self.own.stages else self.plan_bound(error)

    def plus(self, other: ComponentTolerance) -> ComponentTolerance:
        """Return the tolerances for comparing two artifacts."""
        return ComponentTolerance(self.own.plus(other.own), self.base.plus(other.base))


def component_tolerances(
    table: Mapping[str, Tolerance], bundle: Bundle, backend: str, precision: str
) -> dict[str, ComponentTolerance]:
    """Return the tolerances of each component of a backend and precision, or of a mix.

    Raises:
        UserError: the table has no row for a precision.
    """
    return {
        component: _tolerances_of(table, bundle, artifact.precision, artifact.base)
        for component, artifact in bundle.artifacts(backend, precision).items()
    }


def are_overridden(tolerances: Iterable[ComponentTolerance], shipped: Mapping[str, Tolerance]) -> bool:
    """Return whether a row that counts is not one of the shipped table."""
    rows = [row for tolerance in tolerances for row in (tolerance.own, tolerance.base)]
    return any(row not in shipped.values() for row in rows)


def _tolerances_of(
    table: Mapping[str, Tolerance], bundle: Bundle, precision: str, base: str
) -> ComponentTolerance:
    """Return the rows of a precision, or of all quantized precisions, and of its base."""
    is_plan = f"precisions/{precision}/{precision}.yaml" in bundle.manifest.files
    own = table.get(precision) or (table.get("quantized") if is_plan else None)
    if own is None:
        raise UserError(
            f"There is no tolerance for the precision {precision!r}; pass a file with one as --tolerances."
        )
    return ComponentTolerance(own, own if precision in FLOATS else table.get(base, own))


def load_tolerances(override: Path | None = None) -> dict[str, Tolerance]:
    """Load the shipped tolerances by precision, changed by a YAML file of the same form.

    Raises:
        UserError: the file is missing, is not valid YAML, or has unknown keys or invalid values.
    """
    table = {name: Tolerance(**row) for name, row in _read(TABLE).items()}
    for name, row in (_read(override) if override else {}).items():
        keys = {item.name for item in fields(Tolerance)}
        if isinstance(row, dict):
            row = {RENAMED.get(key, key): value for key, value in row.items()}
        if not isinstance(row, dict) or set(row) - keys:
            unknown = ", ".join(sorted(map(str, set(row) - keys))) if isinstance(row, dict) else str(row)
            raise UserError(
                f"{override} has unknown keys for {name}: {unknown}. Valid keys: {', '.join(sorted(keys))}."
            )
        values = _checked(row, f"{override}: {name}")
        try:
            table[name] = replace(table[name], **values) if name in table else Tolerance(**values)
        except TypeError as error:
            raise UserError(f"{override} must set all keys of the new precision {name}: {error}.") from error
    return table


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "file of tolerances")
    if not isinstance(content, dict):
        raise UserError(f"{file} must map precisions to tolerances.")
    return content


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the row with its numbers as floats.

    YAML 1.1 reads ``1e-3``, without a point, as text.
    """
    stages = row.get("stages", {})
    if not isinstance(stages, dict) or set(stages) - set(BOUNDED_STAGES):
        raise UserError(f"{where}.stages has unknown stages. Valid stages: {', '.join(BOUNDED_STAGES)}.")
    numbers = {key: _number(value, f"{where}.{key}") for key, value in row.items() if key != "stages"}
    return {
        **numbers,
        "stages": {key: _number(value, f"{where}.stages.{key}") for key, value in stages.items()},
    }


def _number(value: Any, where: str) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where} must be a number of at least 0, got {value!r}.")
    return number
