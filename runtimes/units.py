"""Numbers as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes for people, in units of 1000."""
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
