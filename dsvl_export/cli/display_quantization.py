"""The tables of ``sensitivity`` and ``plan-precision``."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from calibration.sensitivity import Sensitivity
from dsvl_export.quantization.search import PlanSearchResult
from runtimes.units import size

SHOWN = 20


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """Return a table of the most sensitive layers and precisions."""
    table = Table(title=f"The {SHOWN} most sensitive of {len(sensitivity.rows)}")
    table.add_column("layer", no_wrap=True)
    for heading in ("precision", "KL, nats per token", "answers kept", "weight"):
        table.add_column(heading, justify="right")
    for row in sorted(sensitivity.rows, key=lambda row: -row.kl)[:SHOWN]:
        cells = (escape(row.precision), f"{row.kl:.2e}", f"{row.kept:.1%}", size(row.bytes))
        table.add_row(escape(row.layer), *cells)
    return table


def front_table(result: PlanSearchResult) -> Table:
    """Return a table of the measured and uniform plans by size, with the chosen one marked."""
    table = Table(title=escape(f"Plans for {result.budget}, measured on held-out data"))
    table.add_column("plan")
    for heading in ("weights", "KL predicted", "KL measured", "answers kept"):
        table.add_column(heading, justify="right")
    named = [(point, escape(point.plan.name)) for point in result.uniform]
    named += [(point, "[green]chosen[/]" if point == result.chosen else "") for point in result.front]
    for point, name in sorted(named, key=lambda row: row[0].bytes):
        predicted = f"{point.predicted_kl:.2e}" if point in result.front else ""
        table.add_row(name, size(point.bytes), predicted, f"{point.cost.kl:.2e}", f"{point.cost.kept:.1%}")
    return table
