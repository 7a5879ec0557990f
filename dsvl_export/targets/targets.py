"""Target devices from ``targets.yaml``, and the requests that they support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from dsvl_export.targets.machine import read_bandwidth, shortest_seconds
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError
from runtimes.memory import available_memory

TABLE = Path(__file__).parent / "targets.yaml"
# Bits per weight of a linear layer.
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
# The same for all precisions that targets list; mixed precisions count by most of their weights.
LISTED_BITS = {
    **WEIGHT_BITS, "kv-int8": 32, "int8-weights": 8, "8da8w": 8, "int8-int4": 4, "palette4": 4, "8da4w": 4,
    "8da4w-g128": 4,
}  # fmt: skip
BASES = ("fp32", "fp16", "bf16")
COMPUTES_IN = {"int4": "fp16"}  # precision of the products, if it is not that of the weights
MATRIX_SIZE = 1536  # rows and columns of the matrices whose product is measured


@dataclass(frozen=True)
class Target:
    """A device; the units are those of ``targets.yaml``."""

    name: str
    device: str
    runtime_gb: float
    runtime: str
    backends: Mapping[str, list[str]]
    notes: str
    recipe_base: str = ""
    memory_gb: float = 0.0
    usable_gb: float = 0.0
    bandwidth_gbs: float = 0.0
    tops: Mapping[str, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    sm: int | None = None
    widens: list[str] = field(default_factory=list)
    tensorrt: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    def full_precision(self, name: str) -> str:
        """Return a precision with the base that this target needs: ``int8`` is ``int8-fp16``."""
        is_recipe = name in LISTED_BITS and name not in BASES
        return f"{name}-{self.recipe_base}" if self.recipe_base and is_recipe else name

    def operations(self, precision: str) -> float:
        """Return the peak dense operations per second with weights of a precision."""
        wanted = COMPUTES_IN.get(precision, precision)
        return self.tops.get(wanted, self.tops["fp32"]) * 1e12

    def check(self, backend: str, precision: str) -> None:
        """Check that the device supports a backend and precision.

        Raises:
            UserError: it does not; the message names the nearest precision.
        """
        if backend not in self.backends:
            raise UserError(
                f"{self.device} does not support the backend {backend!r}; it supports"
                f" {', '.join(self.backends)}."
            )
        supported = self.backends[backend]
        if precision not in supported:
            if precision not in LISTED_BITS:
                raise UserError(
                    f"There is no precision {precision!r}; use one of {', '.join(LISTED_BITS)}, or a"
                    " precision plan."
                )
            reason = f" (FP8 needs SM 89, this is SM {self.sm})" if precision == "fp8" and self.sm else ""
            raise UserError(
                f"{self.device} cannot run {precision} with {backend}{reason}. The nearest precision is"
                f" {nearest_precision(precision, supported)}, of {', '.join(supported)}."
            )


def nearest_precision(precision: str, choices: list[str]) -> str:
    """Return the precision of the same size, else the next larger one, else the largest.

    A precision of the KV cache takes the place of no other.
    """
    bits, choices = LISTED_BITS[precision], [name for name in choices if not name.startswith("kv-")]
    larger = [choice for choice in choices if LISTED_BITS[choice] >= bits]
    return min(larger, key=lambda choice: LISTED_BITS[choice]) if larger else choices[0]


@cache
def load_targets() -> dict[str, Target]:
    """Load all targets by name; ``measure_target`` measures the target ``cpu``."""
    rows = read_yaml(TABLE, "table of targets")
    return {name: Target(name=name, **row) for name, row in rows.items()}


def find_target(name: str) -> Target:
    """Return the target of a name or alias; ``cpu`` is not measured.

    Raises:
        UserError: there is no such target.
    """
    table = load_targets()
    name = next((target.name for target in table.values() if name in target.aliases), name)
    if name not in table:
        raise UserError(f"There is no target {name!r}; use one of {', '.join(table)}.")
    return table[name]


def measure_target(target: Target) -> Target:
    """Return the target; for this machine, with its free memory, bandwidth and throughput.

    The measurement reads memory on all cores, and multiplies matrices in fp32, in 8-bit integers
    and, if the processor has it, in bf16; the fastest of four runs counts.
    """
    import torch

    if target.bandwidth_gbs:
        return target
    free = available_memory() / 1e9
    bandwidth = read_bandwidth() / 1e9
    floats = torch.ones(MATRIX_SIZE, MATRIX_SIZE)
    codes = floats.to(torch.int8)
    products = {"fp32": lambda: torch.mm(floats, floats), "int8": lambda: torch._int_mm(codes, codes)}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        halves = floats.bfloat16()
        products["bf16"] = lambda: torch.mm(halves, halves)
    tops = {name: 2 * MATRIX_SIZE**3 / shortest_seconds(product) / 1e12 for name, product in products.items()}
    return replace(target, memory_gb=free, usable_gb=free, bandwidth_gbs=bandwidth, tops=tops)
