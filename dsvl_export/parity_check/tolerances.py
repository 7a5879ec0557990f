"""The tolerances of each precision: one table, ``tolerances.yaml``, that users may override."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError

TABLE = Path(__file__).parent / "tolerances.yaml"
BOUNDED_RUNGS = (
    "preprocess", "vision_encoder", "adaptor", "prefill_logits", "teacher_forced_logits",
    "long_context",
)  # fmt: skip
FLOATS = ("fp32", "fp16", "bf16")
LONG_RUNG = BOUNDED_RUNGS[-1]
PLAN_ROOM = 3  # above a float precision's usual bound: other inputs, more roundings


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one precision; ``tolerances.yaml`` says what each means and where it comes from."""

    noise: float
    factor: float
    ceiling: float
    floor: float
    drift_factor: float
    tie_factor: float
    task_accuracy: float
    generated_length: float
    plan_share: float = 0.35
    layer_floor: float = 0.0
    layer_share: float = 0.0
    layer_row_share: float = 0.0
    rungs: Mapping[str, float] = field(default_factory=dict)

    def bound(self, rung: str, measured_noise: float | None = None) -> float:
        """Largest relative RMS error of a rung; the preprocessing must be equal bit for bit.

        Args:
            measured_noise: of the precision at this rung, for the golden at hand, if known.
        """
        if rung in self.rungs or rung == "preprocess":
            return self.rungs.get(rung, 0.0)
        usual = self.noise * self.factor
        return max(usual, min((measured_noise or 0.0) * self.factor, self.ceiling))

    def plan_bound(self, base: Tolerance, error: float) -> float:
        """Largest relative RMS error from what the precision plan itself computes.

        Args:
            base: of the float precision that the plan is based on, which may be this one.
            error: of the plan from fp32.
        """
        share = self.plan_share + (base.plan_share if base is not self else 0)
        return PLAN_ROOM * base.noise * base.factor + share * error

    def long_bound(self, base: Tolerance, error: float) -> float:
        """As ``plan_bound``, on the long golden."""
        return self.rungs[LONG_RUNG] if LONG_RUNG in self.rungs else self.plan_bound(base, error)

    def band(self, measured_noise: float | None) -> float:
        """Largest relative RMS error of a tap, given the noise of the precision there, if known."""
        return self.drift_factor * max(measured_noise or 0.0, self.floor)

    def layer_bounds(self, noise: float) -> tuple[float, float]:
        """Largest relative RMS errors of a layer on its recorded input, as a whole and of its median row.

        The tolerance is that of the base of the precision.

        Args:
            noise: what the precision costs that layer alone.
        """
        return self.layer_floor + self.layer_share * noise, self.layer_floor + self.layer_row_share * noise

    def plus(self, other: Tolerance) -> Tolerance:
        """For two artifacts compared with each other: each may be off by its own bound."""
        coarser = max(self, other, key=lambda one: one.noise * one.factor)
        return replace(
            coarser,
            noise=(self.noise * self.factor + other.noise * other.factor) / max(coarser.factor, 1e-30),
            ceiling=self.ceiling + other.ceiling,
            floor=self.floor + other.floor,
            rungs={rung: self.bound(rung) + other.bound(rung) for rung in {*self.rungs, *other.rungs}},
        )


def tolerance_for(table: Mapping[str, Tolerance], bundle: Bundle, precision: str) -> Tolerance | None:
    """A precision's own row of the table, or that of all quantized precisions."""
    plan = f"precisions/{precision}/{precision}.yaml"
    return table.get(precision) or (table.get("quantized") if plan in bundle.manifest.files else None)


def tolerance_of_base(
    table: Mapping[str, Tolerance], bundle: Bundle, precision: str, own: Tolerance
) -> Tolerance:
    """The row of the float precision that a precision is based on: its own, where it is one itself."""
    dtype = bundle.manifest.contracts[precision]["decoder"].inputs[0].dtype
    base = {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "fp32")
    return own if precision in (base, *FLOATS) else table.get(base, own)


def load_tolerances(override: Path | None = None) -> dict[str, Tolerance]:
    """Tolerances by precision: the shipped table, changed by a YAML file of the same form.

    Raises:
        UserError: the file is missing, no YAML, or has unknown keys or impossible values.
    """
    table = {name: Tolerance(**row) for name, row in _read(TABLE).items()}
    for name, row in (_read(override) if override else {}).items():
        known = {item.name for item in fields(Tolerance)}
        if not isinstance(row, dict) or set(row) - known:
            unknown = ", ".join(sorted(map(str, set(row) - known))) if isinstance(row, dict) else str(row)
            raise UserError(
                f"{override} has unknown keys for {name}: {unknown}; known are {', '.join(sorted(known))}."
            )
        values = _checked(row, f"{override}: {name}")
        try:
            table[name] = replace(table[name], **values) if name in table else Tolerance(**values)
        except TypeError as error:
            raise UserError(
                f"{override} must give all keys for the new precision {name}: {error}."
            ) from error
    return table


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "file of tolerances")
    if not isinstance(content, dict):
        raise UserError(f"{file} must map precisions to tolerances.")
    return content


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with its numbers as floats; YAML 1.1 reads ``1e-3``, without a point, as text."""
    rungs = row.get("rungs", {})
    if not isinstance(rungs, dict) or set(rungs) - set(BOUNDED_RUNGS):
        raise UserError(f"{where}.rungs has unknown rungs; known are {', '.join(BOUNDED_RUNGS)}.")
    numbers = {key: _number(value, f"{where}.{key}") for key, value in row.items() if key != "rungs"}
    return {**numbers, "rungs": {key: _number(value, f"{where}.rungs.{key}") for key, value in rungs.items()}}


def _number(value: Any, where: str) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where} must be a number of at least 0, got {value!r}.")
    return number
