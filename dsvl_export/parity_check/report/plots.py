"""Plots of a report as inline SVG in the colors of the page, light or dark."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder colors: savefig writes them, and _svg replaces them by the variables of the page.
INK, MUTED, LINE, ACCENT, GOOD, BAD, RANGE = (f"#0{digit}0{digit}0{digit}" for digit in "1234567")
VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", GOOD: "--good", BAD: "--bad",
    RANGE: "--range",
}  # fmt: skip
SMALLEST = 1e-9  # drawn for an error of zero on a logarithmic axis
STYLE = {
    "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": LINE, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.labelcolor": MUTED,
}  # fmt: skip


def stage_plot(stages: list[dict[str, Any]]) -> str:
    """Plot each stage's error, bound and quantization error; empty if no stage has a bound."""
    rows = [stage for stage in stages if stage["errors"] and stage["errors"]["bound"]]
    if not rows:
        return ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "stages"}):
        figure = Figure(figsize=(8.4, 0.8 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, stage in enumerate(reversed(rows)):
            errors = stage["errors"]
            shown = _shown(errors["relative_rms"])
            color = GOOD if stage["state"] == "passed" else BAD
            axes.plot([SMALLEST, shown], [place, place], color=LINE, linewidth=1, zorder=1)
            axes.plot(shown, place, "o", color=color, markersize=8, zorder=3)
            axes.plot(errors["bound"], place, "|", color=INK, markersize=18, markeredgewidth=1.6, zorder=2)
            if errors["quantization_error"]:
                axes.plot(errors["quantization_error"], place, "D", color=MUTED, markersize=5, zorder=2)
        axes.set_yticks(range(len(rows)), [stage["name"].replace("_", " ") for stage in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        _logarithmic(axes.set_xscale, axes)
        axes.set_xlim(_floor([_shown(stage["errors"]["relative_rms"]) for stage in rows]), 2)
        axes.set_xlabel("relative RMS error:  ● artifact   ◆ quantization error of the reference   | bound")
        axes.spines["left"].set_visible(False)
        return _svg(figure, "Error of every stage beside its bound")


def tap_plot(localization: dict[str, Any]) -> str:
    """Plot the errors of a component's taps by depth; the first tap beyond its bound is marked."""
    taps, first = localization["taps"], localization["first"]
    places = range(len(taps))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": localization["component"]}):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(
            places,
            SMALLEST,
            [tap["bound"] for tap in taps],
            facecolor=RANGE,
            edgecolor=GOOD,
            linewidth=0.6,
            label="within the bound",
        )
        measured = [
            (place, tap["quantization_error"]) for place, tap in enumerate(taps) if tap["quantization_error"]
        ]
        if measured:
            axes.plot(
                *zip(*measured, strict=True), ":", color=MUTED, linewidth=1.4,
                label="quantization error of the reference",
            )  # fmt: skip
        values = [_shown(tap["relative_rms"]) for tap in taps]
        axes.plot(places, values, "-o", color=ACCENT, markersize=4, linewidth=1.4, label="artifact")
        if first:
            place = [tap["name"] for tap in taps].index(first)
            axes.plot(place, values[place], "o", color=BAD, markersize=10, zorder=4)
            side = "right" if place > len(taps) / 2 else "left"
            axes.annotate(
                first, (place, values[place]), (-12 if side == "right" else 12, 4),
                textcoords="offset points", ha=side, color=BAD, fontweight="bold",
            )  # fmt: skip
        step = max(1, len(taps) // 30)
        axes.set_xticks(places[::step], [tap["name"] for tap in taps][::step], rotation=60, ha="right")
        _logarithmic(axes.set_yscale, axes)
        axes.set_ylim(_floor([*values, *(tap["bound"] for tap in taps)]), 4)
        axes.set_ylabel("relative RMS error")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)
        return _svg(figure, f"Error of the {localization['component']} by depth")


def _shown(error: float | None) -> float:
    """Return the error as it is drawn; NaN and infinity are drawn at the edge."""
    return 2.0 if error is None else min(max(error, SMALLEST), 2.0)


def _floor(values: list[float]) -> float:
    """Return the start of a logarithmic axis: two decades below the smallest value."""
    return max(min(values) / 100, SMALLEST)


def _logarithmic(set_scale: Any, axes: Axes) -> None:
    """Make an axis logarithmic, without minor ticks."""
    set_scale("log")
    axes.minorticks_off()


def _svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element with an accessible label."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg role="img" aria-label="{label}" viewBox="\1">',
        text,
        count=1,
    )
