"""Targets: devices as data (``targets.yaml``), and which requests they can serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from dsvl_export.targets.machine import best_of, read_bandwidth
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError
from runtimes.memory import available_memory

TABLE = Path(__file__).parent / "targets.yaml"
# Bits per weight of a linear layer, and the precision that its products are computed in.
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
# The same of all that targets may list; mixed weights count by those that are most.
LISTED_BITS = {
    **WEIGHT_BITS, "kv-int8": 32, "int8-weights": 8, "8da8w": 8, "int8-int4": 4, "palette4": 4, "8da4w": 4,
    "8da4w-g128": 4,
}  # fmt: skip
COMPUTES_IN = {"int4": "fp16"}
SIDE = 1536  # of the matrices whose product is timed


@dataclass(frozen=True)
class Target:
    """A device; the units are those of ``targets.yaml``."""

    name: str
    device: str
    runtime_gb: float
    runtime: str
    backends: Mapping[str, list[str]]
    notes: str
    memory_gb: float = 0.0
    usable_gb: float = 0.0
    bandwidth_gbs: float = 0.0
    tops: Mapping[str, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    sm: int | None = None
    widens: list[str] = field(default_factory=list)
    tensorrt: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    def operations(self, precision: str) -> float:
        """Peak dense operations per second where weights have this precision."""
        wanted = COMPUTES_IN.get(precision, precision)
        return self.tops.get(wanted, self.tops["fp32"]) * 1e12

    def check(self, backend: str, precision: str) -> None:
        """Raise UserError where the device does not serve the request; it names what comes nearest."""
        if backend not in self.backends:
            raise UserError(f"{self.device} has no backend {backend!r}; it has {', '.join(self.backends)}.")
        there = self.backends[backend]
        if precision not in there:
            if precision not in LISTED_BITS:
                raise UserError(f"There is no precision {precision!r}; there are {', '.join(LISTED_BITS)}.")
            why = f" (FP8 needs SM 89, this is SM {self.sm})" if precision == "fp8" and self.sm else ""
            raise UserError(
                f"{self.device} cannot run {precision} with {backend}{why}; the nearest is"
                f" {nearest(precision, there)}, of {', '.join(there)}."
            )


def nearest(precision: str, choices: list[str]) -> str:
    """The precision of the same size where there is one, else the next larger, else the largest."""
    bits = LISTED_BITS[precision]
    larger = [choice for choice in choices if LISTED_BITS[choice] >= bits]
    return min(larger, key=lambda choice: LISTED_BITS[choice]) if larger else choices[0]


@cache
def load_targets() -> dict[str, Target]:
    """All targets by name; ``cpu`` is not measured yet, see ``measured``."""
    rows = read_yaml(TABLE, "table of targets")
    return {name: Target(name=name, **row) for name, row in rows.items()}


def find_target(name: str) -> Target:
    """A target; this machine's is not measured yet.

    Raises:
        UserError: there is none of that name.
    """
    table = load_targets()
    name = next((target.name for target in table.values() if name in target.aliases), name)
    if name not in table:
        raise UserError(f"There is no target {name!r}; there are {', '.join(table)}.")
    return table[name]


def measured(target: Target) -> Target:
    """The target; where it is this machine, with its memory, and its bandwidth and throughput by trial.

    Reading by all cores, and matrix products in fp32 and of 8-bit integers; the best of four each.
    """
    import torch

    if target.bandwidth_gbs:
        return target
    free = available_memory() / 1e9
    bandwidth = read_bandwidth() / 1e9
    floats = torch.ones(SIDE, SIDE)
    codes = floats.to(torch.int8)
    works = {"fp32": lambda: torch.mm(floats, floats), "int8": lambda: torch._int_mm(codes, codes)}
    tops = {name: 2 * SIDE**3 / best_of(work) / 1e12 for name, work in works.items()}
    return replace(target, memory_gb=free, usable_gb=free, bandwidth_gbs=bandwidth, tops=tops)
