"""This machine: system, processor, memory, bandwidth, and versions of the installed packages."""

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

# Distributions whose versions decide what works on a machine.
PACKAGES = (
    "torch", "torchao", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx",
    "cuda-python", "cuda-bindings",
    "openvino", "coremltools", "coreai-core", "coreai-torch", "executorch", "optimum", "optimum-onnx",
    "transformers",
    "numpy", "pillow", "tokenizers", "safetensors",
)  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")
MAX_BYTES_READ = 512 << 20  # to measure the bandwidth: more than the caches of a processor


def describe_machine() -> dict[str, Any]:
    """Return system, processor, cores, memory in bytes (total and available) and Python version."""
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
    """Return the installed versions of ``PACKAGES``, without those that are not installed."""
    versions = {"dsvl-export": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def read_bandwidth(threads: int | None = None) -> float:
    """Measure the bytes per second that threads read from memory; None uses all cores."""
    threads = threads or usable_cores()
    part = min(MAX_BYTES_READ, available_memory() // 4) // threads
    parts = [np.ones(max(part // 4, 1), np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / shortest_seconds(lambda: list(pool.map(_square, parts)))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shortest_seconds(call: Callable[[], object], repeats: int = 4) -> float:
    """Call a function several times; return the seconds of the fastest call."""
    return min(measure_seconds(call) for _ in range(repeats))


def measure_seconds(call: Callable[[], object]) -> float:
    """Call a function; return the seconds that it took."""
    started = perf_counter()
    call()
    return perf_counter() - started


def _square(part: np.ndarray) -> float:
    return float(np.dot(part, part))
