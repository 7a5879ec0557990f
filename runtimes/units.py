"""Formatting of quantities for people."""

from __future__ import annotations


def size(count: int) -> str:
    """Format a number of bytes in units of 1000, such as ``1.2 GB``."""
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
