"""The warning that a bundle needs more memory than the machine has free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtimes.bundle.bundle import Bundle


def warn_of_memory(
    bundle: Bundle,
    backend: str,
    precision: str,
    device: str | None = None,
    capacity: int | None = None,
    remedy: str = "use a smaller precision",
) -> None:
    """Warn if a bundle needs more memory than is free; the operating system may still provide it.

    Args:
        bundle: the bundle to open.
        backend: the backend to run.
        precision: the precision to run.
        device: the device to run on; None is the backend's default.
        capacity: capacity of the KV cache, in tokens; None is the bundle's.
        remedy: what the user of the command can do.
    """
    from rich.markup import escape

    from dsvl_export.cli import display
    from runtimes.execution import execution
    from runtimes.memory import available_memory, required_memory
    from runtimes.units import size

    executed = execution(bundle, backend, precision, device)
    if not executed.runnable or executed.device != "cpu":
        return
    needed, free = required_memory(bundle, backend, precision, capacity), available_memory()
    if needed > free:
        display.err.print(
            f"[yellow]Low memory:[/] {escape(f'{backend} {precision}')} needs {size(needed)} with KV cache"
            f" and activations, but only {size(free)} are free; {remedy}."
        )
