"""The memory that a process can still use, and how much of it a component needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.cache import cache_bytes

MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Version of control groups → files of the limit and of the usage, and the rows of memory.stat that
# count reclaimable pages of files.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}
# Backends whose CPU kernels compute halves in fp32; tensorrt and tensorrt_rtx by their ONNX files.
WIDENED = ("coreml", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")


def available_memory() -> int:
    """Return the bytes that can be used without swapping, within the limits of a container."""
    return min([int(psutil.virtual_memory().available), *_available_in_groups()])


def _available_in_groups() -> Iterator[int]:
    """Yield the available bytes of each control group of this process that has a limit (Linux)."""
    if not MEMBERSHIP.exists():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # the path may be the host's; then the root counts
            available = _available_in_group(folder, *FILES[version])
            if available is not None:
                yield available
            if folder == root:
                break


def _available_in_group(folder: Path, limit: str, usage: str, cached: tuple[str, ...]) -> int | None:
    try:
        limit_bytes = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(limit_bytes - used + sum(int(rows.get(name, 0)) for name in cached), 0)


def widening(backend: str, contract: Contract) -> int:
    """Return the most memory on a CPU, as a multiple of a component's stored bytes (1 or 2)."""
    return 2 if backend in WIDENED and contract.inputs[0].dtype == "float16" else 1


def required_memory(bundle: Bundle, backend: str, precision: str, capacity: int | None) -> int:
    """Return the bytes of weights, KV cache and activations while a bundle runs on a CPU.

    Args:
        bundle: the bundle.
        backend: one of its backends.
        precision: one of its precisions.
        capacity: tokens of the KV cache; None is the bundle's default.
    """
    artifacts = bundle.artifacts(backend, precision)
    states = bundle.contract("decoder", backend, precision).states
    default = bundle.manifest.default_capacity
    tokens = capacity or min(default, artifacts["decoder"].capacity or default)
    engines = {item.engine.file for item in artifacts.values() if item.engine}
    widened: dict[str, int] = {}  # by file; components may share one
    active = []
    for component, item in artifacts.items():
        factor = widening(item.backend, bundle.contract(component, backend, precision))
        widened |= {file: factor * bundle.manifest.files[file].bytes for file in {*item.files} - engines}
        active.append(factor * (item.activation_bytes + tokens * item.activation_bytes_per_token))
    return sum(widened.values()) + max(active) + cache_bytes(states, 1, tokens)


def decoder_weights(bundle: Bundle, backend: str, precision: str) -> int:
    """Return the bytes of a decoder's weights while it runs on a CPU."""
    decoder = bundle.artifact("decoder", backend, precision)
    stored = sum(bundle.manifest.files[file].bytes for file in decoder.files)
    return widening(decoder.backend, bundle.contract("decoder", backend, precision)) * stored
