"""INT8 and FP8 of the vision encoder beside NVIDIA ModelOpt's, on the same fp32 file and the same data.

ModelOpt wants an environment of its own (it pins ONNX Runtime), so this runs in three steps:

    python benchmarks/modelopt_comparison.py prepare WORK
    OTHER/bin/python benchmarks/modelopt_comparison.py quantize WORK     # pip install 'nvidia-modelopt[onnx]'
    python benchmarks/modelopt_comparison.py compare WORK

``compare`` prints, for each file: quantized matrix products and convolutions, error of the features on
held-out pictures, exact match on the held-out questions with fp32 adaptor and decoder, and bytes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

SAMPLES = 64


def prepare(work: Path) -> None:
    """The fp32 bundle, ours in INT8 and FP8, and the preprocessed calibration pictures."""
    from calibration.data import load_data
    from dsvl_export.exporter.export import export
    from runtimes.pipeline import Pipeline
    from runtimes.preprocess import preprocess

    bundle = export("tiny", work / "bundle", precisions=["fp32", "int8", "fp8"])
    chain = Pipeline.open(bundle, precision="fp32").chain
    images = dict.fromkeys(
        image for sample in load_data("bundled", SAMPLES).samples for image in sample.images
    )
    pixels = np.stack([preprocess(image, chain.preprocessing) for image in images])
    np.save(work / "pixels.npy", pixels)
    print(f"{len(pixels)} pictures")


def quantize(work: Path) -> None:
    """ModelOpt's files, with its defaults, and with fp32 kept for what is not quantized."""
    from modelopt.onnx.quantization import quantize as run

    source = work / "bundle/onnxruntime/fp32/vision_encoder/vision_encoder.onnx"
    pixels = np.load(work / "pixels.npy")
    for mode, method in (("int8", "entropy"), ("int8", "max"), ("fp8", "max")):
        folder = work / f"modelopt-{mode}-{method}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        file = Path(shutil.copyfile(source, folder / "source.onnx"))
        run(
            str(file),
            mode,
            {"pixel_values": pixels},
            method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(folder / "vision_encoder.onnx"),
            log_level="ERROR",
        )


def compare(work: Path) -> None:
    """The table."""
    import onnx

    from reference.tiny import HELDOUT
    from runtimes.backends import onnxruntime as backend
    from runtimes.bundle.bundle import Bundle
    from runtimes.goldens.golden import relative_rms
    from runtimes.goldens.task import load_task, run_task
    from runtimes.pipeline import Pipeline
    from runtimes.preprocess import preprocess
    from runtimes.session import SessionOptions

    bundle, items = Bundle.open(work / "bundle"), load_task(HELDOUT)
    contract = bundle.manifest.contracts["fp32"]["vision_encoder"]
    exact = Pipeline.open(bundle, precision="fp32")
    images = list(dict.fromkeys(image for item in items for image in item.images))[:100]
    pixels = np.stack([preprocess(image, exact.chain.preprocessing) for image in images])
    wanted = exact.chain.encode_pixels(pixels)
    files = {
        f"dsvl-export {mode}": work / f"bundle/onnxruntime/{mode}/vision_encoder/vision_encoder.onnx"
        for mode in ("int8", "fp8")
    }
    files |= {folder.name: folder / "vision_encoder.onnx" for folder in sorted(work.glob("modelopt-*"))}
    print(
        "| file | MatMul | Conv | error high | error low | exact match | kB |\n|---|---|---|---|---|---|---|"
    )
    for name, file in files.items():
        nodes = onnx.load(str(file)).graph.node
        made = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
        counts = []
        for kind in ("MatMul", "Conv"):
            own = [node for node in nodes if node.op_type == kind]
            counts.append(f"{sum(set(node.input[:2]) <= made for node in own)} of {len(own)}")
        pipeline = Pipeline.open(bundle, precision="fp32")
        pipeline.chain.vision_encoder = backend.open_component(file, contract, SessionOptions())
        found = pipeline.chain.encode_pixels(pixels)
        errors = [f"{relative_rms(found[key], wanted[key]):.2e}" for key in ("high_features", "low_features")]
        score = run_task(pipeline, items, lambda: None)
        cells = [*counts, *errors, f"{score.accuracy:.1%}", f"{file.stat().st_size / 1e3:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["prepare", "quantize", "compare"])
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    {"prepare": prepare, "quantize": quantize, "compare": compare}[arguments.step](arguments.work)
