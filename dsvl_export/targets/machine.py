"""What this machine is, and which versions of what matters are installed on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dsvl_export.version import __version__
from runtimes.memory import available_memory

# Distributions whose versions decide what works here.
PACKAGES = (
    "torch", "torchao", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx",
    "cuda-python", "cuda-bindings",
    "coremltools", "coreai-core", "coreai-torch", "executorch", "optimum", "optimum-onnx", "transformers",
    "numpy", "pillow", "tokenizers", "safetensors",
)  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")
READ_AT_MOST = 512 << 20  # bytes that the bandwidth is measured on: more than a processor's caches hold


def describe_machine() -> dict[str, Any]:
    """System, processor, cores, memory in bytes (all and free) and Python."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_memory(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Installed versions of ``PACKAGES``; what is not installed is left out."""
    found = {"dsvl-export": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that so many threads together read from memory; None takes all cores."""
    threads = threads or usable_cores()
    part = min(READ_AT_MOST, available_memory() // 4) // threads
    parts = [np.ones(max(part // 4, 1), np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / best_of(lambda: list(pool.map(_square, parts)))


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_of(work: Callable[[], object], repeats: int = 4) -> float:
    """The fewest seconds that some work took."""
    return min(timed(work) for _ in range(repeats))


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work took."""
    started = perf_counter()
    work()
    return perf_counter() - started


def _square(part: np.ndarray) -> float:
    return float(np.dot(part, part))
