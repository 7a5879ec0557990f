"""The plot of ``bench``: time to first token by stage, and decoding speed with its bound."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

from dsvl_export.bench.bench import BenchResult

COLORS = ("#9aa5b1", "#2f6f9f", "#6fb1a0", "#d98c3f")  # of the stages, in order


def bench_plot(result: BenchResult) -> str:
    """Return the plot as an SVG document."""
    style = {"svg.hashsalt": "bench", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        stages, decoding = figure.subplots(2, 1, height_ratios=(1, 3))
        start = 0.0
        for (name, timing), color in zip(result.stages.items(), COLORS, strict=True):
            label = f"{name.replace('_', ' ')} {timing.median:.3g} s"
            stages.barh(0, timing.median, left=start, color=color, label=label)
            start += timing.median
        stages.set_yticks([])
        stages.set_xlabel("seconds to the first token")
        stages.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, frameon=False)
        contexts = [row.context for row in result.decoding]
        rates = [row.tokens_per_second for row in result.decoding]
        spread = [
            [row.tokens_per_second - 1 / row.step.high for row in result.decoding],
            [1 / row.step.low - row.tokens_per_second for row in result.decoding],
        ]
        decoding.errorbar(contexts, rates, spread, fmt="-o", capsize=4, color=COLORS[1], label="measured")
        if all(row.bound for row in result.decoding):
            bounds = [row.bound for row in result.decoding]
            decoding.plot(contexts, bounds, "--", color="#555555", label="memory-bandwidth bound")
        if isinstance(result.predicted, dict):
            predicted = result.predicted["tokens_per_second"]
            decoding.plot(
                result.predicted["context"],
                predicted,
                "D",
                color=COLORS[3],
                label="prediction of plan, at most",
            )
        decoding.set_ylim(bottom=0)
        decoding.set_xlabel("tokens of context")
        decoding.set_ylabel("tokens per second")
        decoding.legend(frameon=False, fontsize=9)
        figure.suptitle(f"{result.backend} {result.precision}, {result.execution}", fontsize=11)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
