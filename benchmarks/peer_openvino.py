"""OpenVINO on a decoder of random weights; run by ``peers.py`` in an environment of its own.

The form is the group size of its 4-bit weights: ``int4-32`` or ``int4-128`` (symmetric, by NNCF), in the
stateful model that optimum-intel exports, with the logits of the last token
alone; its activations are rounded to 8 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_transformers
from peer_command import Feed, main


def make(form: str, shape: dict[str, Any], folder: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = Path(scratch) / "source"
        peer_transformers.make_checkpoint(shape, source)
        scheme = OVWeightQuantizationConfig(bits=4, sym=True, group_size=int(form.split("-")[1]), ratio=1.0)
        model = OVModelForCausalLM.from_pretrained(
            source, export=True, quantization_config=scheme, compile=False
        )
        model.save_pretrained(folder)


def load(form: str, folder: Path, threads: int) -> tuple[Feed, Callable[[], None]]:
    import numpy as np
    import openvino
    import openvino.opset13 as opset

    core = openvino.Core()
    model = core.read_model(folder / "openvino_model.xml")
    head = model.output("logits").node
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = opset.slice(head.input_value(0), [-1], [2**31 - 1], [1], [1])  # as openvino-genai cuts it
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    state = {"length": 0}

    def feed(ids: list[int]) -> None:
        start = state["length"]
        state["length"] = end = start + len(ids)
        request.infer({
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip

    def forget() -> None:
        request.reset_state()
        state["length"] = 0

    return feed, forget


if __name__ == "__main__":
    main(make, load)
