"""Apple's packages at the released widths, made and executed on Linux: time, peak memory, bytes, parity.

    python benchmarks/apple_packages.py widths WORK    # both variants, reduced depth, with the parity check
    python benchmarks/apple_packages.py full WORK      # the 1.3B's whole shape in Core ML, fp16 and 4 bits
    python benchmarks/apple_packages.py half WORK      # Core AI in fp16: one layer, one picture, a few tokens
    python benchmarks/apple_packages.py tiny WORK      # Core AI in fp16 and int4: tiny and its parity check

Checkpoints have random weights (``make_checkpoint.py``). Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from make_checkpoint import config_of, write
from measuring import check_parity, cost, measured

CAPACITY = 1024
LAYERS, VISION_LAYERS = 1, 2
TOKENS = 4
HEAD = "- {layers: decoder.head, precision: int8-weights}\n"
RULES = "rules:\n- {layers: 'decoder.layers.*', kind: linear, precision: %s}\n" + HEAD
FOUR_BIT = {
    "four-bit": "base: fp16\n" + RULES % "int4-g32",
    "four-bit-palette": "base: fp16\n" + RULES % "palette4-g16",
}
FOUR_BIT_COREAI = {"four-bit-float": "base: fp32\n" + RULES % "int4-g32"}


def convert(checkpoint: Path, bundle: Path, backend: str, precision: str, goldens: bool) -> dict[str, int]:
    """Export; bytes of each component."""
    from dsvl_export.exporter.export import export

    made = export(str(checkpoint), bundle, backend, [precision], goldens, capacity=CAPACITY)
    _, name = made.select(backend, Path(precision).stem if precision.endswith(".yaml") else precision)
    return {
        item.component: sum(made.manifest.files[file].bytes for file in item.files)
        for item in made.manifest.artifacts
        if (item.backend, item.precision) == (backend, name)
    }


def plans(work: Path, texts: dict[str, str]) -> list[str]:
    """Precision plans as files."""
    for name, text in texts.items():
        (work / f"{name}.yaml").write_text(text)
    return [str(work / f"{name}.yaml") for name in texts]


def one(
    work: Path, checkpoint: Path, title: str, backend: str, precision: str, with_parity: bool = True
) -> None:
    bundle = work / f"{title}-bundle"
    found = measured(convert, checkpoint, bundle, backend, precision, with_parity)
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in found["result"].items())
    name = Path(precision).stem if precision.endswith(".yaml") else precision
    print(f"\n{title}, {backend} {name}: {sizes}; exported in {cost(found)}", flush=True)
    if with_parity:
        proof = measured(check_parity, bundle, backend, name)
        print(f"Parity: {json.dumps(proof['result'])} in {cost(proof)}", flush=True)


def widths(work: Path, sizes: list[str]) -> None:
    """Full width, small depth and vocabulary."""
    for size in sizes:
        checkpoint = work / f"{size}-narrow"
        if not checkpoint.exists():
            write(config_of(size, LAYERS, VISION_LAYERS, 1031), checkpoint)
        for precision in ("fp16", *plans(work, FOUR_BIT)):
            one(work, checkpoint, size, "coreml", precision)
        for precision in ("fp32", *plans(work, FOUR_BIT_COREAI)):
            one(work, checkpoint, size, "coreai", precision)


def full(work: Path, sizes: list[str]) -> None:
    """The 1.3B's whole shape."""
    checkpoint = work / "1.3b"
    if not checkpoint.exists():
        started = time.perf_counter()
        total = write(config_of("1.3b", None, None, None), checkpoint)
        print(f"Checkpoint: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    for precision in ("fp16", *plans(work, FOUR_BIT)):
        one(work, checkpoint, "1.3b", "coreml", precision, with_parity=False)


def few(checkpoint: Path, bundle: Path) -> dict[str, float]:
    """Relative RMS of a component against the fp32 reference on the same inputs, in Core AI's fp16."""
    from skimage.data import astronaut

    from dsvl_export.exporter.export import export
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.session import reference_chain
    from runtimes.goldens.golden import relative_rms
    from runtimes.pipeline import Pipeline
    from runtimes.preprocess import preprocess

    made = export(str(checkpoint), bundle, "coreai", ["fp16"], goldens=False, capacity=64)
    table = made.path(made.manifest.token_embedding)
    ours, judge = (
        Pipeline.open(made, "coreai", "fp16").chain,
        reference_chain(open_checkpoint(str(checkpoint)), table),
    )
    pixels = preprocess(astronaut(), judge.preprocessing)[None]
    features, wanted = ours.encode_pixels(pixels), judge.encode_pixels(pixels)
    errors = {name: relative_rms(features[name], wanted[name]) for name in wanted}
    given = {name: array.astype(features[name].dtype) for name, array in wanted.items()}
    errors["image_embeds"] = relative_rms(ours.adapt(given), judge.adapt(wanted))
    caches = [chain.decoder.new_cache(1, 64) for chain in (ours, judge)]
    steps = [
        [chain.decode(np.array([[token]]), cache)[0, 0] for token in range(7, 7 + TOKENS)]
        for chain, cache in zip((ours, judge), caches, strict=True)
    ]
    errors["logits"] = relative_rms(np.stack(steps[0]), np.stack(steps[1]))
    return errors


def half(work: Path, sizes: list[str]) -> None:
    """Full width in half precision, which Core AI's runtime multiplies number by number on a CPU."""
    for size in sizes:
        checkpoint = work / f"{size}-one-layer"
        if not checkpoint.exists():
            write(config_of(size, 1, 1, 1031), checkpoint)
        found = measured(few, checkpoint, work / f"{size}-half-bundle")
        print(f"\n{size}, coreai fp16: {json.dumps(found['result'])} in {cost(found)}", flush=True)


def tiny(work: Path, sizes: list[str]) -> None:
    """Half precision in Core AI, whose runtime multiplies halves one by one on a CPU."""
    for precision in ("fp16", "int4"):
        one(work, Path("tiny"), "tiny", "coreai", precision)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("widths", "full", "half", "tiny"))
    parser.add_argument("work", type=Path)
    parser.add_argument("sizes", nargs="*", default=["1.3b", "7b"], help="for widths and half: 1.3b, 7b")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    {"widths": widths, "full": full, "half": half, "tiny": tiny}[given.what](given.work, given.sizes)


if __name__ == "__main__":
    main()
