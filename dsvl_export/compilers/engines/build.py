"""Build engines from parsed networks: optimization profiles, builder settings, error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dsvl_export.compilers.engines.network import ParsedNetwork
from runtimes.backends.engines.machine import HARDWARE_COMPATIBLE, VERSION_COMPATIBLE
from runtimes.backends.engines.trust import trust_engine
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.bundle.files import write_bytes
from runtimes.chain import PREFILL_CHUNK
from runtimes.errors import UserError

Range = tuple[int, int, int]  # smallest, likeliest and largest size
ONE: Range = (1, 1, 1)
MAX_LOGIT_ROWS = 64  # of logits in one call
# How TensorRT says that its workspace is too small.
WORKSPACE_WORDS = ("workspace", "insufficient memory", "could not find any implementation")


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine build.

    Args:
        capacity: tokens of the KV cache; the largest number where the file leaves it dynamic.
        max_batch: sequences that decode together.
        compute_capabilities: SM numbers, for TensorRT-RTX alone; TensorRT builds for the present
            GPU.
        workspace_bytes: limit of a kernel's scratch memory; None is TensorRT's own limit.
        timing_cache: file with measured kernel times, read and written; makes the next build
            faster.
        version_compatible: the engine also runs on later releases of the same major version.
        hardware_compatible: the engine runs on every GPU from Ampere on, but slower.
        weight_streaming: weights may stay in host memory if the GPU's memory is too small.
        dla_core: DLA core of a Jetson; layers that it cannot run fall back to the GPU.
    """

    capacity: int
    max_batch: int = 8
    compute_capabilities: tuple[int, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    dla_core: int | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """List the options that are set, by the names that the manifest uses."""
        flags = {
            VERSION_COMPATIBLE: self.version_compatible,
            HARDWARE_COMPATIBLE: self.hardware_compatible,
            "weight-streaming": self.weight_streaming,
            f"dla-{self.dla_core}": self.dla_core is not None,
            f"workspace-{self.workspace_bytes}": self.workspace_bytes is not None,
        }
        return tuple(name for name, wanted in flags.items() if wanted)


def profiles(contract: Contract, settings: EngineSettings) -> list[dict[str, Range]]:
    """List the optimization profiles as ranges of named dims; the decoder has two.

    The decoder has one profile for prefill and one for decode, the other components have one.
    """
    if not contract.states:
        return [{"batch": ONE}]
    capacity = (1, settings.capacity, settings.capacity)
    chunk = min(PREFILL_CHUNK, settings.capacity)
    prefill = {
        "batch": ONE,
        "sequence": (1, chunk, chunk),
        "rows": (1, 1, min(chunk, MAX_LOGIT_ROWS)),
        "capacity": capacity,
    }
    decode = {"batch": (1, 1, settings.max_batch), "sequence": ONE, "rows": ONE, "capacity": capacity}
    return [prefill, decode]


def build_engine(
    trt: ModuleType, file: Path, contract: Contract, settings: EngineSettings, engine: Path
) -> None:
    """Build the engine of an ONNX file and write it.

    Raises:
        UserError: TensorRT refuses the file; the message gives its reason.
    """
    parsed = ParsedNetwork(trt, file, contract, settings.capacity)
    config = parsed.builder.create_builder_config()
    configure(trt, config, settings)
    for ranges in profiles(contract, settings):
        config.add_optimization_profile(_profile(parsed, ranges))
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise UserError(_refusal(parsed, settings))
    parsed.check_build()
    engine.write_bytes(plan)
    with suppress(OSError):  # the home is read-only: an engine with code then needs --trust-engine
        trust_engine(engine)
    times = config.get_timing_cache() if settings.timing_cache else None
    if settings.timing_cache and times is not None:  # a finished build does not fail for it
        settings.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(settings.timing_cache, bytes(times.serialize()))


def configure(trt: ModuleType, config: Any, settings: EngineSettings) -> None:
    """Apply the settings to a builder config.

    Raises:
        UserError: TensorRT-RTX does not support a compute capability.
    """
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, number in enumerate(settings.compute_capabilities):
            config.set_compute_capability(_capability(trt, number), index)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if settings.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = settings.dla_core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if settings.timing_cache:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        # A timing cache of another device is refused.
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)


def _refusal(parsed: ParsedNetwork, settings: EngineSettings) -> str:
    """Explain a failed build in one sentence, with what to do."""
    reason = parsed.logger.errors()
    remedy = ""
    if settings.workspace_bytes is not None and any(word in reason.lower() for word in WORKSPACE_WORDS):
        remedy = f"; give more than {settings.workspace_bytes / 1e6:.0f} MB by --workspace"
    elif "memory" in reason.lower():
        remedy = "; close other programs, or build with a smaller --capacity or --workspace"
    return f"TensorRT cannot build {parsed.file}: {reason}{remedy}."


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


def check_capabilities(trt: ModuleType, numbers: Sequence[int]) -> None:
    """Check that TensorRT-RTX builds engines for compute capabilities.

    Raises:
        UserError: it does not support one.
    """
    for number in numbers:
        _capability(trt, number)


def _capability(trt: ModuleType, number: int) -> Any:
    try:
        return getattr(trt.ComputeCapability, f"SM{number}")
    except AttributeError:
        there = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        raise UserError(
            f"TensorRT-RTX {trt.__version__} builds no engines for SM {number}; it supports"
            f" {', '.join(map(str, there))}."
        ) from None
