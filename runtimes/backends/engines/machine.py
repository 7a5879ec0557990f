"""Compatibility of a bundle's engines with this machine."""

from __future__ import annotations

from runtimes.backends.engines.cuda import Gpu
from runtimes.bundle.manifest import Engine

VERSION_COMPATIBLE, HARDWARE_COMPATIBLE = "version-compatible", "hardware-compatible"


def engine_mismatch(engine: Engine, gpu: Gpu, library: str, version: str) -> str | None:
    """Explain why an engine cannot run on a machine, as the end of a sentence; None if it can.

    An engine requires the compute capability and the TensorRT version that built it. Unless it is
    hardware-compatible, it also requires the same GPU model, on which its kernels were timed and
    selected.
    """
    this_gpu = f"this machine has {gpu.name} (SM {gpu.sm})"
    portable = HARDWARE_COMPATIBLE in engine.options and gpu.sm >= 80
    if engine.platform not in ("", gpu.platform):
        return f"its engine was built on {engine.platform}, but this machine is {gpu.platform}"
    if gpu.sm not in engine.sm and not portable:
        return f"its engine was built for SM {', '.join(map(str, engine.sm))}, but {this_gpu}"
    if engine.gpu and engine.gpu != gpu.name and not portable:
        return f"its engine was built on {engine.gpu}, but {this_gpu}"
    if engine.tensorrt != version and not (VERSION_COMPATIBLE in engine.options and _newer(engine, version)):
        return f"its engine was built by {library} {engine.tensorrt}, but {version} is installed"
    return None


def _newer(engine: Engine, version: str) -> bool:
    """Whether ``version`` is a later release of the engine's major version, which also runs it."""
    built, installed = (tuple(map(int, text.split(".")[:2])) for text in (engine.tensorrt, version))
    return built[0] == installed[0] and installed >= built
