"""What this machine is, and which versions of what matters are installed on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
