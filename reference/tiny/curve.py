"""Plot of a training log: ``python -m reference.tiny.curve DIR/curve.jsonl curve.svg``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHING_WINDOW = 5  # points of the running mean, 20 steps each


def plot_curve(log: Path, output: Path) -> None:
    """Plot dense accuracy and answer-token accuracy over all steps, one stage after the other."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dsvl-export"  # a log always gives the same file
    from matplotlib import pyplot

    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    # A resumed training logs some steps again.
    rows = list({(line["stage"], line["step"]): line for line in lines}.values())
    rows.sort(key=lambda row: (row["stage"], row["step"]))
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    start = 0
    for stage in sorted({row["stage"] for row in rows}):
        part = [row for row in rows if row["stage"] == stage]
        steps = start + np.array([row["step"] for row in part])
        for key, color, label in (
            ("name", "tab:blue", "digit or shape of an image token's cell (adaptor)"),
            ("token_accuracy", "tab:red", "answer tokens (decoder)"),
        ):
            if key in part[0]:
                values = np.array([row[key] for row in part])
                window = min(SMOOTHING_WINDOW, len(values))
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                axes.plot(steps[window - 1 :], smooth, color=color, label=label)
        axes.axvline(start, color="0.8", zorder=0)
        axes.text(start + 20, 0.02, f"stage {stage}", color="0.4")
        start = int(steps[-1])
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique.keys(), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False
    )
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), xlim=(0, start))
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    plot_curve(Path(sys.argv[1]), Path(sys.argv[2]))
