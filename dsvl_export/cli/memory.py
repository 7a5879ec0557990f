"""What commands say before they open a bundle that the machine's memory is too small for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtimes.bundle import Bundle


def warn_of_memory(
    bundle: Bundle,
    backend: str,
    precision: str,
    device: str | None = None,
    capacity: int | None = None,
    remedy: str = "take a smaller precision",
) -> None:
    """Say what a bundle takes where less is free; the system may still find room.

    Args:
        capacity: of the KV cache; None is the bundle's.
        remedy: what the command's user can do.
    """
    from rich.markup import escape

    from dsvl_export import display
    from dsvl_export.units import size
    from runtimes.backends import load_backend
    from runtimes.memory import available_memory
    from runtimes.pipeline import needed_memory

    decoder = bundle.artifact("decoder", backend, precision)
    execution = load_backend(backend).execution(decoder, device)
    if not execution.judgeable or execution.device != "cpu":
        return
    needed, free = needed_memory(bundle, backend, precision, capacity), available_memory()
    if needed > free:
        display.err.print(
            f"[yellow]Short of memory:[/] {escape(f'{backend} {precision}')} takes {size(needed)} with KV"
            f" cache and activations, {size(free)} are free; {remedy}."
        )
