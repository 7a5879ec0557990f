"""Apple's packages at the released widths, made and executed on Linux: time, peak memory, bytes, the ladder.

    python benchmarks/apple_packages.py widths WORK    # both variants, reduced depth, with the ladder
    python benchmarks/apple_packages.py full WORK      # the 1.3B's whole shape in Core ML with 4-bit weights
    python benchmarks/apple_packages.py full WORK      # the 1.3B's whole shape in Core ML, fp16 and 4 bits

Checkpoints have random weights (``make_checkpoint.py``). Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from make_checkpoint import config_of, write
from measuring import cost, measured

CAPACITY = 1024
LAYERS, VISION_LAYERS = 1, 2
FOUR_BIT = {
    "four-bit": "base: fp16\nrules:\n- {layers: 'decoder.layers.*', kind: linear, precision: int4-g32}\n"
    "- {layers: decoder.head, precision: int8-weights}\n",
    "four-bit-palette": "base: fp16\nrules:\n"
    "- {layers: 'decoder.layers.*', kind: linear, precision: palette4-g16}\n"
    "- {layers: decoder.head, precision: int8-weights}\n",
}


def convert(checkpoint: Path, bundle: Path, backend: str, precision: str, goldens: bool) -> dict[str, int]:
    """Export; bytes of each component."""
    from dsvl_export.exporting import export

    made = export(str(checkpoint), bundle, backend, [precision], goldens, capacity=CAPACITY)
    _, name = made.select(backend, Path(precision).stem if precision.endswith(".yaml") else precision)
    return {
        item.component: sum(made.manifest.files[file].bytes for file in item.files)
        for item in made.manifest.artifacts
        if (item.backend, item.precision) == (backend, name)
    }


def climb(bundle: Path, backend: str, precision: str) -> dict[str, Any]:
    """The ladder."""
    from dsvl_export.ladder import parity
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    result = parity(opened, *opened.select(backend, precision))
    errors = {rung.name: rung.errors.relative_rms for rung in result.rungs if rung.errors}
    failed = [str(rung) for rung in result.rungs if rung.state == "failed"]
    return {"verdict": result.verdict, "by": str(result.execution), "errors": errors, "failed": failed}


def plans(work: Path) -> dict[str, str]:
    """Precision plans by name, as files."""
    found = {}
    for name, text in FOUR_BIT.items():
        (work / f"{name}.yaml").write_text(text)
        found[name] = str(work / f"{name}.yaml")
    return found


def one(work: Path, checkpoint: Path, title: str, backend: str, precision: str, ladder: bool = True) -> None:
    bundle = work / f"{title}-bundle"
    found = measured(convert, checkpoint, bundle, backend, precision, ladder)
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in found["result"].items())
    name = Path(precision).stem if precision.endswith(".yaml") else precision
    print(f"\n{title}, {backend} {name}: {sizes}; exported in {cost(found)}", flush=True)
    if ladder:
        proof = measured(climb, bundle, backend, name)
        print(f"Ladder: {json.dumps(proof['result'])} in {cost(proof)}", flush=True)


def widths(work: Path, sizes: list[str]) -> None:
    """Full width, small depth and vocabulary."""
    for size in sizes:
        checkpoint = work / f"{size}-narrow"
        if not checkpoint.exists():
            write(config_of(size, LAYERS, VISION_LAYERS, 1031), checkpoint)
        for precision in ("fp16", *plans(work).values()):
            one(work, checkpoint, size, "coreml", precision)
        one(work, checkpoint, size, "coreai", "fp32")


def full(work: Path, sizes: list[str]) -> None:
    """The 1.3B's whole shape."""
    checkpoint = work / "1.3b"
    if not checkpoint.exists():
        started = time.perf_counter()
        total = write(config_of("1.3b", None, None, None), checkpoint)
        print(f"Checkpoint: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    for precision in ("fp16", *plans(work).values()):
        one(work, checkpoint, "1.3b", "coreml", precision, ladder=False)


def tiny(work: Path, sizes: list[str]) -> None:
    """Half precision in Core AI, whose runtime multiplies halves one by one on a CPU."""
    for precision in ("fp16", "int4"):
        one(work, Path("tiny"), "tiny", "coreai", precision)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("widths", "full", "tiny"))
    parser.add_argument("work", type=Path)
    parser.add_argument("sizes", nargs="*", default=["1.3b", "7b"], help="for widths: 1.3b, 7b")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    {"widths": widths, "full": full, "tiny": tiny}[given.what](given.work, given.sizes)


if __name__ == "__main__":
    main()
