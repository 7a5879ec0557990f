"""Engines from parsed networks: optimization profiles, builder settings, and errors as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dsvl_export.engines.network import ParsedNetwork, one_line
from runtimes.chain import PREFILL_CHUNK
from runtimes.contracts import Contract, TensorSpec
from runtimes.errors import UserError

Range = tuple[int, int, int]  # smallest, likeliest and largest size
ONE: Range = (1, 1, 1)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built for.

    Args:
        capacity: tokens of the KV cache, the most where the file leaves it dynamic.
        max_batch: rows that decode together.
        compute_capabilities: SM numbers, for TensorRT-RTX alone; the others build for the GPU at hand.
        workspace_bytes: most scratch memory that a kernel may ask for; None is TensorRT's own limit.
    """

    capacity: int
    max_batch: int = 8
    compute_capabilities: tuple[int, ...] = ()
    workspace_bytes: int | None = None


def profiles(contract: Contract, settings: EngineSettings) -> list[dict[str, Range]]:
    """Ranges of the contract's named dims: prefill and decode for the decoder, one for the others."""
    if not contract.states:
        return [{"batch": ONE}]
    capacity = (1, settings.capacity, settings.capacity)
    chunk = min(PREFILL_CHUNK, settings.capacity)
    prefill = {"batch": ONE, "sequence": (1, chunk, chunk), "rows": (1, 1, chunk), "capacity": capacity}
    decode = {"batch": (1, 1, settings.max_batch), "sequence": ONE, "rows": ONE, "capacity": capacity}
    return [prefill, decode]


def build_engine(
    trt: ModuleType, file: Path, contract: Contract, settings: EngineSettings, engine: Path
) -> None:
    """Build the engine of an ONNX file and write it.

    Raises:
        UserError: TensorRT refuses; the sentence gives its reason.
    """
    parsed = ParsedNetwork(trt, file, contract, settings.capacity)
    config = parsed.builder.create_builder_config()
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, number in enumerate(settings.compute_capabilities):
            config.set_compute_capability(_capability(trt, number), index)
    for ranges in profiles(contract, settings):
        config.add_optimization_profile(_profile(parsed, ranges))
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise UserError(f"TensorRT cannot build {file}: {one_line(parsed.errors())}.")
    engine.write_bytes(plan)


def _profile(parsed: ParsedNetwork, ranges: Mapping[str, Range]) -> Any:
    profile = parsed.builder.create_optimization_profile()
    specs = {spec.name: spec for spec in parsed.contract.inputs + parsed.contract.states}
    for tensor in parsed.inputs():
        if -1 in tuple(tensor.shape):
            shapes = [_shape(specs[tensor.name], tensor.shape, ranges, which) for which in range(3)]
            profile.set_shape(tensor.name, *shapes)
    return profile


def _shape(spec: TensorSpec, found: Any, ranges: Mapping[str, Range], which: int) -> tuple[int, ...]:
    """A shape of the spec with its named dims filled in; what the network made static stays."""
    return tuple(
        size if size != -1 else ranges[str(dim)][which] for dim, size in zip(spec.shape, found, strict=True)
    )


def _capability(trt: ModuleType, number: int) -> Any:
    try:
        return getattr(trt.ComputeCapability, f"SM{number}")
    except AttributeError:
        there = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        raise UserError(
            f"TensorRT-RTX {trt.__version__} builds no engines for SM {number}; it knows"
            f" {', '.join(map(str, there))}."
        ) from None
