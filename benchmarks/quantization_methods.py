"""What each calibration method adds, on settings that are hard for plain rounding.

    python benchmarks/quantization_methods.py [--samples 64]

Two settings on the bundled model: 4-bit weights in groups of 128, and INT8 weights and activations on the
same model with planted outliers (16 channels of every norm times 30, divided out of the layers that read
them, so that the fp32 model computes the same). Costs are measured on questions that calibration never saw.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from calibration import quantized_weights as weight_scales
from calibration.choose_scales import build_scale_table
from calibration.data import load_data
from calibration.evaluation import Evaluation
from calibration.folding import list_foldings
from calibration.planned_model import planned_model
from calibration.precision_plan import LayerPrecision, PrecisionPlan, Rule
from calibration.quantized_weights import QuantizedWeights
from calibration.ranges import METHODS
from calibration.statistics import collect_statistics
from dsvl_export.quantization.calibrate import temporary_token_embedding
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint, parameter_shapes
from reference.checkpoint.layouts import parameter_sources
from reference.tiny import TINY

CHANNELS, OUTLIER = 16, 30.0


def with_outliers(folder: Path) -> Checkpoint:
    """The tiny checkpoint, the same function with outlier channels before every layer that reads a norm."""
    for file in TINY.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    source = open_checkpoint("tiny")
    tensors = {name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()}
    names = parameter_sources(source.config, parameter_shapes(source.config))
    generator = torch.Generator().manual_seed(0)
    for folding in list_foldings(source.config):
        if "norm" not in folding.producer:
            continue
        for kind in ("weight", "bias"):
            parameter = f"{folding.producer}.{kind}"
            if parameter not in names:
                continue
            (name,) = names[parameter].names
            if kind == "weight":
                chosen = torch.randperm(len(tensors[name]), generator=generator)[:CHANNELS]
            tensors[name][chosen] *= OUTLIER
        for consumer in folding.consumers:
            (name,) = names[f"{consumer}.weight"].names
            tensors[name][:, chosen] /= OUTLIER
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(folder))


def compare(
    source: Checkpoint, plan: PrecisionPlan, samples: int, rows: list[tuple[str, dict[str, object]]]
) -> None:
    data = load_data("bundled", 128).samples
    with temporary_token_embedding(source) as embedding, tempfile.TemporaryDirectory() as folder:
        statistics = collect_statistics(source, embedding, data[::2][:samples], Path(folder))
        evaluation = Evaluation(source, embedding, data[1::2], source.load_model())
        for name, options in rows:
            clip = options.pop("clip", True)
            weight_scales.CLIP_RATIOS = CLIPS if clip else ()
            table = build_scale_table(source, statistics, tune_for=plan, **options)  # type: ignore[arg-type]
            cost = evaluation.measure_cost(planned_model(QuantizedWeights(source, plan, table)))
            print(f"| {name} | {cost.kl:.2e} | {cost.kept:.1%} |", flush=True)


CLIPS = weight_scales.CLIP_RATIOS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64, help="samples to calibrate with")
    samples = parser.parse_args().samples
    head = "| method | KL, nats per token | answers kept |\n|---|---|---|"
    off = {"smooth": False, "gptq": False}
    print(f"4-bit weights in groups of 128, all linear layers\n\n{head}")
    four = PrecisionPlan("int4-g128", rules=(Rule("*", LayerPrecision("int4", 128), "linear"),))
    compare(
        open_checkpoint("tiny"), four, samples,
        [
            ("rounding, scales from the largest weight", {**off, "clip": False}),
            ("rounding, clipped scales", off.copy()),
            ("smoothing (AWQ)", {**off, "smooth": True}),
            ("GPTQ", {**off, "gptq": True}),
            ("smoothing and GPTQ", {}),
        ],
    )  # fmt: skip
    print(f"\nINT8 weights and activations, planted outliers\n\n{head}")
    eight = PrecisionPlan("int8", rules=(Rule("*", LayerPrecision("int8")),))
    methods = [
        (
            f"{method}{', smoothing (SmoothQuant)' if smooth else ''}",
            {**off, "method": method, "smooth": smooth},
        )
        for smooth in (False, True)
        for method in METHODS
    ]
    with tempfile.TemporaryDirectory() as folder:
        compare(with_outliers(Path(folder)), eight, samples, [(name, dict(row)) for name, row in methods])
    print(f"\nINT8 weights and activations, the model as it is\n\n{head}")
    compare(open_checkpoint("tiny"), eight, samples, [(name, dict(row)) for name, row in methods])


if __name__ == "__main__":
    main()
