"""How time and memory grow: with context, images, depth and width; a table, JSON and a plot.

    python benchmarks/growth.py WORK RESULTS

Weights are random, precision is 8da4w-g128 in ONNX Runtime, threads are 2. Context and images are measured on
the whole 1.3B, depth and width on decoders with one vision layer; each point is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import checkpoint_of, measured, timed

BACKEND, PRECISION, THREADS = "onnxruntime", "8da4w-g128", 2
CONTEXTS, IMAGES = (128, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8)
DEPTHS, WIDTHS = (6, 12, 24), {"1.3b": 2048, "7b": 4096}
WIDTH_LAYERS, TOKENS = 4, 12


def export_once(work: Path, size: str, layers: int | None, vision: int | None) -> Path:
    """A bundle of this shape, as this code exports it."""
    bundle = work / f"growth-{size}-{layers or 'all'}-{vision or 'all'}"
    measured(_export, bundle, checkpoint_of(work, size, layers, vision, None))
    return bundle


def _export(bundle: Path, checkpoint: Path) -> None:
    from dsvl_export.exporter.export import export

    export(str(checkpoint), bundle, BACKEND, [PRECISION], goldens=False)


def decoding(bundle: Path, context: int) -> dict[str, float]:
    """Seconds of a prefill of ``context`` tokens and of a step behind it."""
    from runtimes.pipeline import Pipeline

    pipeline = Pipeline.open(
        bundle, BACKEND, PRECISION, threads=THREADS, verify=False, capacity=context + TOKENS
    )
    chain = pipeline.chain
    cache = chain.decoder.new_cache(1, pipeline.capacity)
    tokens = np.random.default_rng(0).integers(300, 4000, context + TOKENS)
    chain.prefill(chain.embed_tokens(tokens[:128]), cache)  # warm
    cache.reset()
    prefill = timed(lambda: chain.prefill(chain.embed_tokens(tokens[:context]), cache))
    steps = [timed(lambda: chain.decode(tokens[None, :1], cache)) for _ in range(TOKENS)]
    return {"prefill": prefill, "step": statistics.median(steps)}


def images(bundle: Path, count: int) -> dict[str, float]:
    """Seconds to the first token of a question about so many pictures, and of the vision in it."""
    from runtimes.pipeline import Pipeline
    from runtimes.text.prompt import IMAGE_PLACEHOLDER

    pipeline = Pipeline.open(bundle, BACKEND, PRECISION, threads=THREADS, verify=False, capacity=8192)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(count + 1)]
    chain = pipeline.chain
    chain.embed_prompt(IMAGE_PLACEHOLDER, pictures[-1:])  # warm
    vision = timed(lambda: chain.embed_prompt(IMAGE_PLACEHOLDER * count, pictures[:count]))
    embeds = chain.embed_prompt(pipeline.format("Describe them.", count), pictures[:count])
    cache = chain.decoder.new_cache(1, pipeline.capacity)
    chain.prefill(embeds, cache)  # warm
    cache.reset()
    return {"vision": vision, "prefill": timed(lambda: chain.prefill(embeds, cache))}


def point(found: dict[str, Any]) -> dict[str, float]:
    return {**found["result"], "peak": found["peak"] / 1e9}


def measure(work: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Axis → place → numbers."""
    whole = export_once(work, "1.3b", None, None)
    found: dict[str, dict[str, dict[str, float]]] = {}

    def note(axis: str, place: object, numbers: dict[str, float]) -> None:
        found.setdefault(axis, {})[str(place)] = numbers
        print(
            f"{axis} {place}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()),
            flush=True,
        )

    for context in CONTEXTS:
        note("context", context, point(measured(decoding, whole, context)))
    for count in IMAGES:
        note("images", count, point(measured(images, whole, count)))
    for depth in DEPTHS:
        bundle = whole if depth == DEPTHS[-1] else export_once(work, "1.3b", depth, 1)
        note("depth", depth, point(measured(decoding, bundle, 512)))
    for size, width in WIDTHS.items():
        bundle = export_once(work, size, WIDTH_LAYERS, 1)
        note("width", width, point(measured(decoding, bundle, 512)))
    return found


def plot(found: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """A panel for each axis: seconds to the left, gigabytes to the right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "growth", "font.size": 9, "axes.spines.top": False}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        for axes, (axis, rows) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
            places = [int(place) for place in rows]
            for name in next(iter(rows.values())):
                if name == "peak":
                    continue
                scale, unit = (1000, "ms") if name == "step" else (1, "s")
                values = [row[name] * scale for row in rows.values()]
                axes.plot(places, values, "-o", label=f"{name}, {unit}")
            memory = axes.twinx()
            memory.plot(
                places, [row["peak"] for row in rows.values()], "--s", color="#888888", label="peak, GB"
            )
            memory.set_ylim(bottom=0)
            axes.set_ylim(bottom=0)
            axes.set_yscale("symlog" if axis == "context" else "linear")
            axes.set_xlabel(axis)
            if axis != "context":
                axes.set_xticks(places)
            lines = [*axes.get_lines(), *memory.get_lines()]
            axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False)
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    given = parser.parse_args()
    for folder in (given.work, given.results):
        folder.mkdir(parents=True, exist_ok=True)
    found = measure(given.work)
    (given.results / "growth.json").write_text(json.dumps(found, indent=2))
    plot(found, given.results / "growth.svg")


if __name__ == "__main__":
    main()
