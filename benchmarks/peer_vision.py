"""transformers' vision towers in PyTorch and OpenVINO, random weights, one image; run by ``encoders.py``.

    python peer_vision.py siglip|sam eager|compile|openvino-fp32|bf16 REPEATS

Prints one JSON list of seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import SamVisionConfig, SamVisionModel, SiglipVisionConfig, SiglipVisionModel

THREADS = 2


def model_of(tower: str) -> tuple[torch.nn.Module, int]:
    """The module and its image size: SigLIP-L/16 at 384, SAM-B/16 at 1024."""
    torch.manual_seed(0)
    if tower == "sam":
        return SamVisionModel(SamVisionConfig(attn_implementation="eager")).eval(), 1024
    config = SiglipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=384, patch_size=16, vision_use_head=False,
    )  # fmt: skip
    return SiglipVisionModel(config).eval(), 384


def in_openvino(model: torch.nn.Module, side: int, precision: str) -> Callable[[], object]:
    import openvino

    converted = openvino.convert_model(model, example_input={"pixel_values": torch.rand(1, 3, side, side)})
    settings = {
        "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    pixels = np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)
    return lambda: request.infer({"pixel_values": pixels})


def in_torch(model: torch.nn.Module, side: int, form: str, precision: str) -> Callable[[], object]:
    torch.set_num_threads(THREADS)
    pixels = torch.rand(1, 3, side, side)
    if precision == "bf16":
        model, pixels = model.bfloat16(), pixels.bfloat16()
    called = torch.compile(model) if form == "compile" else model

    def run() -> object:
        with torch.inference_mode():
            return called(pixel_values=pixels)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tower", choices=("siglip", "sam"))
    parser.add_argument("form", help="eager, compile, openvino-fp32 or openvino-bf16")
    parser.add_argument("repeats", type=int)
    given = parser.parse_args()
    library, _, precision = given.form.partition("-")
    model, side = model_of(given.tower)
    if library == "openvino":
        run = in_openvino(model, side, precision)
    else:
        run = in_torch(model, side, library, precision)
    run()
    seconds = []
    for _ in range(given.repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
