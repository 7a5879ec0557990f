"""How this machine can execute the artifacts of a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.mixes import device_of, joined_devices
from runtimes.session import Execution


def component_executions(
    bundle: Bundle, backend: str, precision: str, device: str | None = None
) -> dict[str, Execution]:
    """Return how this machine can execute each component; see ``execution``."""
    return {
        component: load_backend(item.backend).execution(item, device_of(device, component))
        for component, item in bundle.artifacts(backend, precision).items()
    }


def execution(bundle: Bundle, backend: str, precision: str, device: str | None = None) -> Execution:
    """Return how this machine can execute the artifacts of a backend and precision, or of a mix.

    It is the weakest kind of execution of all components.

    Args:
        bundle: the bundle.
        backend: one of its backends.
        precision: one of its precisions.
        device: as ``device_of`` reads it.
    """
    executions = component_executions(bundle, backend, precision, device)
    least = weakest(executions.values())
    if not least.runnable:
        return least
    runtimes = dict.fromkeys(state.by for state in executions.values() if state.kind == least.kind)
    devices = {component: state.device for component, state in executions.items()}
    return replace(least, by=", ".join(runtimes), device=joined_devices(devices))


def weakest(executions: Iterable[Execution]) -> Execution:
    """Return the execution that proves least."""
    order = ("not run", "built only", "simulated", "ran")
    return min(executions, key=lambda execution: order.index(execution.kind))
