"""How much memory a process can still get, and what a component takes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from runtimes.bundle.contracts import Contract

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# By version of control groups: their limit, what is used of it, and what of that are files' pages.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}
# Backends of which a CPU runs halves in fp32: ONNX Runtime's kernels (engines' ONNX files too), and MIL's.
WIDENED = ("coreml", "onnxruntime", "tensorrt", "tensorrt_rtx")


def available_memory() -> int:
    """Bytes that can be used without swapping, inside the limits that a container or a service has.

    Where the system does not say, all of its memory.
    """
    return min([_of_machine(), *_of_groups()])


def _of_machine() -> int:
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What is left in each control group around this process that has a limit."""
    if not MEMBERSHIP.exists():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container, the path may be the host's: then the root
            left = _left(folder, *FILES[version])
            if left is not None:
                yield left
            if folder == root:
                break


def _left(folder: Path, limit: str, usage: str, cached: tuple[str, ...]) -> int | None:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(most - used + sum(int(rows.get(name, 0)) for name in cached), 0)


def widening(backend: str, contract: Contract) -> int:
    """How many times its stored bytes a component takes at most in a CPU's memory, where it has no engine."""
    return 2 if backend in WIDENED and contract.inputs[0].dtype == "float16" else 1
