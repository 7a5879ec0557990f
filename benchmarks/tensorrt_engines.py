"""Engines at the released widths, built without a GPU: time, peak memory, bytes, and the parity check.

    python benchmarks/tensorrt_engines.py widths WORK    # both variants, reduced depth, with the parity check
    python benchmarks/tensorrt_engines.py full WORK      # the 1.3B's whole shape, fp16 and int4

Checkpoints have random weights (``make_checkpoint.py``). Every build is a process of its own, so that its
peak memory is its own. Prints Markdown tables.
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
from measuring import check_parity, cost, measured

CAPACITY = 1024
LAYERS, VISION_LAYERS = 1, 2  # of SAM, one in windows and one global
FOUR_BIT = "base: fp16\nrules:\n- {layers: 'decoder.*', kind: linear, precision: int4-g128}\n"


def export_onnx(
    checkpoint: Path, bundle: Path, precision: str, scales: Path | None, goldens: bool
) -> dict[str, Any]:
    """The ONNX files alone, for TensorRT 11; the engines are built and measured apart."""
    from dsvl_export.exporter.export import export

    made = export(
        checkpoint,
        bundle,
        "tensorrt",
        [precision],
        goldens,
        scales=scales,
        tensorrt="11.4",
        capacity=CAPACITY,
    )
    _, name = made.select("tensorrt", Path(precision).stem if precision.endswith(".yaml") else precision)
    return {"precision": name}


def build(bundle: Path, precision: str, component: str, sm: int) -> dict[str, int]:
    """One engine of TensorRT-RTX."""
    import tensorrt_rtx

    from dsvl_export.compilers.engines.build import EngineSettings, build_engine
    from runtimes.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    artifact = opened.artifact(component, "tensorrt", precision)
    file = opened.path(artifact.files[0])
    engine = bundle.parent / f"{component}.engine"
    settings = EngineSettings(CAPACITY, compute_capabilities=(sm,))
    build_engine(tensorrt_rtx, file, opened.manifest.contracts[precision][component], settings, engine)
    stored = sum(opened.manifest.files[name].bytes for name in artifact.files)
    size = engine.stat().st_size
    engine.unlink()
    return {"onnx": stored, "engine": size}


def calibrated(checkpoint: Path, folder: Path) -> None:
    from dsvl_export.quantization.calibrate import CalibrationOptions, calibrate
    from reference.checkpoint.checkpoint import open_checkpoint

    calibrate(open_checkpoint(str(checkpoint)), folder, CalibrationOptions(samples=4, rows=0))


def builds(bundle: Path, precision: str, sm: int) -> None:
    for component in ("vision_encoder", "adaptor", "decoder"):
        found = measured(build, bundle, precision, component, sm)
        sizes = found["result"]
        print(
            f"| {precision} | {component} | {sm} | {sizes['onnx'] / 1e6:.0f} | {sizes['engine'] / 1e6:.0f} |"
            f" {found['seconds']:.0f} | {found['peak'] / 1e9:.1f} |",
            flush=True,
        )


HEAD = (
    "| precision | component | SM | ONNX, MB | engine, MB | seconds | peak RSS, GB |\n"
    "|---|---|---|---|---|---|---|"
)


def widths(work: Path, sizes: list[str]) -> None:
    """Full width, small depth and vocabulary, every precision, with the parity check."""
    for size in sizes:
        checkpoint = work / f"{size}-narrow"
        if not checkpoint.exists():
            write(config_of(size, LAYERS, VISION_LAYERS, 1031), checkpoint)
        scales = work / f"{size}-scales"
        if not scales.exists():
            print(f"calibrated in {measured(calibrated, checkpoint, scales)['seconds']:.0f} s", flush=True)
        plan = work / "four-bit.yaml"
        plan.write_text(FOUR_BIT)
        for asked in ("fp16", "int8", "fp8", str(plan)):
            bundle = work / f"{size}-bundle"
            found = measured(
                export_onnx, checkpoint, bundle, asked, scales if asked in ("int8", "fp8") else None, True
            )
            precision = found["result"]["precision"]
            print(f"\n{size}, {precision}: exported in {cost(found)}\n\n{HEAD}")
            builds(bundle, precision, 89)
            proof = measured(check_parity, bundle, "tensorrt", precision)
            print(f"\nParity: {json.dumps(proof['result'])} in {cost(proof)}", flush=True)


def full(work: Path, sizes: list[str]) -> None:
    """The 1.3B's whole shape in fp16 and with a 4-bit decoder."""
    checkpoint = work / "1.3b"
    if not checkpoint.exists():
        started = time.perf_counter()
        total = write(config_of("1.3b", None, None, None), checkpoint)
        print(f"Checkpoint: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    plan = work / "four-bit.yaml"
    plan.write_text(FOUR_BIT)
    for asked in ("fp16", str(plan)):
        bundle = work / "1.3b-bundle"
        found = measured(export_onnx, checkpoint, bundle, asked, None, False)
        precision = found["result"]["precision"]
        print(f"\n{precision}: exported in {cost(found)}\n\n{HEAD}")
        builds(bundle, precision, 89)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("widths", "full"))
    parser.add_argument("work", type=Path)
    parser.add_argument("sizes", nargs="*", default=["1.3b", "7b"], help="for widths: 1.3b, 7b")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    {"widths": widths, "full": full}[given.what](given.work, given.sizes)


if __name__ == "__main__":
    main()
