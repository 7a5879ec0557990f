"""Whether an engine of a bundle is one for this machine."""

from __future__ import annotations

from runtimes.backends.engines.cuda import Gpu
from runtimes.bundle.manifest import Engine

VERSION_COMPATIBLE, HARDWARE_COMPATIBLE = "version-compatible", "hardware-compatible"


def mismatch(engine: Engine, gpu: Gpu, library: str, version: str) -> str | None:
    """Why an engine cannot run on a machine, as the end of a sentence; None where it can.

    An engine belongs to the compute capability and the TensorRT that built it, and, unless it was built
    hardware-compatible, to the very GPU: its kernels were chosen by timing them there.
    """
    here = f"here is {gpu.name} (SM {gpu.sm})"
    portable = HARDWARE_COMPATIBLE in engine.options and gpu.sm >= 80
    if engine.platform not in ("", gpu.platform):
        return f"its engine was built on {engine.platform}, here is {gpu.platform}"
    if gpu.sm not in engine.sm and not portable:
        return f"its engine was built for SM {', '.join(map(str, engine.sm))}, {here}"
    if engine.gpu and engine.gpu != gpu.name and not portable:
        return f"its engine was built on {engine.gpu}, {here}"
    if engine.tensorrt != version and not (VERSION_COMPATIBLE in engine.options and _newer(engine, version)):
        return f"its engine was built by {library} {engine.tensorrt}, here is {version}"
    return None


def _newer(engine: Engine, version: str) -> bool:
    """A version-compatible engine runs on later releases of its major version."""
    built, here = (tuple(map(int, text.split(".")[:2])) for text in (engine.tensorrt, version))
    return built[0] == here[0] and here >= built
