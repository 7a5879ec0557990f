"""Plots of the sensitivity by layer, and of the Pareto front of precision plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from calibration.budget_search import MeasuredPlan
    from calibration.sensitivity import Sensitivity

STYLE = {"svg.hashsalt": "dsvl-export", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
COLORS = ("#2f5fd0", "#b4541f", "#1d7a4b", "#7a3ea8", "#555555")
LEAST_KL = 1e-9  # drawn for a divergence of zero on a logarithmic axis


def draw_sensitivity(sensitivity: Sensitivity, file: Path) -> None:
    """Plot the KL divergence of quantizing one layer, a line for each precision, as SVG."""
    layers = list(sensitivity.floats)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(8.0, 0.13 * len(layers)), 4.6), layout="constrained")
        axes = figure.subplots()
        for color, precision in zip(
            COLORS, sorted({row.precision for row in sensitivity.rows}), strict=False
        ):
            rows = {
                row.layer: max(row.kl, LEAST_KL) for row in sensitivity.rows if row.precision == precision
            }
            places = [place for place, layer in enumerate(layers) if layer in rows]
            values = [rows[layers[place]] for place in places]
            axes.plot(places, values, "-o", color=color, markersize=3.5, linewidth=1, label=precision)
        axes.set_yscale("log")
        axes.set_ylabel("KL divergence, nats per token")
        step = max(1, len(layers) // 80)
        axes.set_xticks(range(0, len(layers), step), layers[::step], rotation=90, fontsize=6)
        axes.set_title("KL divergence when one layer is quantized", loc="left")
        axes.legend(frameon=False, ncols=3)
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_front(
    chosen: MeasuredPlan, front: list[MeasuredPlan], uniform: list[MeasuredPlan], budget: str, file: Path
) -> None:
    """Plot KL divergence against bytes of weights of the measured and uniform plans, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        size = [point.bytes / 1e6 for point in front]
        cost = [max(point.cost.kl, LEAST_KL) for point in front]
        axes.plot(size, cost, "-o", color=COLORS[0], markersize=4, label="plans, measured on held-out data")
        for index, point in enumerate(uniform):
            place = (point.bytes / 1e6, max(point.cost.kl, LEAST_KL))
            axes.plot(*place, "s", color=COLORS[1])
            axes.annotate(
                point.plan.name,
                place,
                (7, 5 - 14 * (index % 2)),
                textcoords="offset points",
                color=COLORS[1],
            )
        place = (chosen.bytes / 1e6, max(chosen.cost.kl, LEAST_KL))
        axes.plot(*place, "o", color=COLORS[2], markersize=10, label=f"chosen for {budget}")
        axes.set_yscale("log")
        axes.set_xlabel("weights of linear layers and convolutions, MB")
        axes.set_ylabel("KL divergence, nats per token")
        axes.set_title("Precision plans", loc="left")
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})
