"""Faults planted into single layers of exported ONNX artifacts, as real mistakes would look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import sha256_of_file, write_json
from runtimes.bundle.manifest import MANIFEST, FileEntry

Edit = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Fault:
    """What is done to which component, and the tap that must be named for it."""

    name: str
    component: str
    tap: str
    edit: Edit


def plant(folder: Path, precision: str, component: str, edit: Edit) -> Bundle:
    """Edit an artifact of a bundle and give it its new hash, so that only the parity check can notice."""
    path = f"onnxruntime/{precision}/{component}/{component}.onnx"
    model = onnx.load(str(folder / path))
    edit(model)
    onnx.save(model, str(folder / path))
    return rehash(folder, path)


def rehash(folder: Path, path: str) -> Bundle:
    """Give a file its new hash, and leave no artifact audited: an exporter that did not look wrote it so."""
    bundle = Bundle.open(folder)
    bundle.manifest.files[path] = FileEntry((folder / path).stat().st_size, sha256_of_file(folder / path))
    for artifact in bundle.manifest.artifacts:
        artifact.audited.clear()
    write_json(folder / MANIFEST, bundle.manifest.to_dict())
    return bundle


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Change the values of one initializer."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = [item for item in model.graph.initializer if item.name == name]
        changed = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), name))

    return edit


def node(name: str, change: Callable[[onnx.GraphProto, NodeProto], None]) -> Edit:
    """Change one node."""

    def edit(model: onnx.ModelProto) -> None:
        (found,) = [item for item in model.graph.node if item.name == name]
        change(model.graph, found)

    return edit


def zeroed(column: int) -> Callable[[np.ndarray], np.ndarray]:
    """One output channel of a (transposed) weight is lost."""

    def change(values: np.ndarray) -> np.ndarray:
        values[..., column] = 0
        return values

    return change


def scaled(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values * np.asarray(factor, values.dtype)


def attribute(name: str, value: object) -> Callable[[onnx.GraphProto, NodeProto], None]:
    def edit(graph: onnx.GraphProto, found: NodeProto) -> None:
        kept = [item for item in found.attribute if item.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def swapped_inputs(first: int, second: int) -> Callable[[onnx.GraphProto, NodeProto], None]:
    def edit(graph: onnx.GraphProto, found: NodeProto) -> None:
        found.input[first], found.input[second] = found.input[second], found.input[first]

    return edit


def swapped_between(first: str, second: str, index: int) -> Edit:
    """Two nodes read each other's input."""

    def edit(model: onnx.ModelProto) -> None:
        nodes = {item.name: item for item in model.graph.node}
        one, other = nodes[first], nodes[second]
        one.input[index], other.input[index] = other.input[index], one.input[index]

    return edit


def swapped_halves(head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """The two RoPE halves of every head of a transposed projection change places."""

    def change(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(values.shape[0], -1, 2, head_dim // 2)
        return heads[:, :, ::-1].reshape(values.shape)

    return change


ATTENTION = "scaled_dot_product_attention_joined"  # heads of 32 channels
TINY_FAULTS = [
    # A zeroed row
    Fault("zeroed row, SAM MLP", "vision_encoder", "high.blocks.2",
          weight("high.blocks.2.mlp.fc1.weight_transposed", zeroed(3))),
    Fault("zeroed row, SigLIP projection", "vision_encoder", "low.blocks.0",
          weight("low.blocks.0.attn.proj.weight_transposed", zeroed(7))),
    Fault("zeroed row, decoder value", "decoder", "layers.1",
          weight("layers.1.self_attn.v_proj.weight_transposed", zeroed(3))),
    Fault("zeroed row, last decoder MLP", "decoder", "layers.3",
          weight("layers.3.mlp.down_proj.weight_transposed", zeroed(11))),
    Fault("zeroed row, adaptor branch", "adaptor", "low_up_proj",
          weight("low_up_proj.weight_transposed", zeroed(5))),
    Fault("zeroed row, adaptor output", "adaptor", "layers.1",
          weight("layers.1.weight_transposed", zeroed(5))),
    Fault("zeroed row, head", "decoder", "head", weight("head.weight_transposed", zeroed(40))),
    # RoPE
    Fault("swapped RoPE halves of the queries", "decoder", "layers.2",
          weight("layers.2.self_attn.q_proj.weight_transposed", swapped_halves(32))),
    Fault("interleaved RoPE", "decoder", "layers.0",
          node("layers.0.self_attn/cached_attention", attribute("rotary_interleaved", 1))),
    Fault("cosines and sines swapped", "decoder", "layers.3",
          node("layers.3.self_attn/cached_attention", swapped_inputs(7, 8))),
    # A wrong mask
    Fault("window instead of causal mask", "decoder", "layers.2",
          node("layers.2.self_attn/cached_attention", attribute("local_window_size", 16))),
    Fault("no relative positions", "vision_encoder", "high.blocks.1",
          weight("high.blocks.1.attn/transpose_folded", scaled(0))),
    Fault("rows and columns of the relative positions swapped", "vision_encoder", "high.blocks.3",
          swapped_between("high.blocks.3.attn/matmul", "high.blocks.3.attn/matmul_2", 1)),
    # A transposed window
    Fault("transposed window", "vision_encoder", "high.blocks.0",
          node("high.blocks.0/transpose", attribute("perm", [0, 1, 3, 4, 2, 5]))),
    Fault("windows in the wrong order", "vision_encoder", "high.blocks.2",
          node("high.blocks.2/transpose_2", attribute("perm", [0, 2, 3, 1, 4, 5]))),
    # A scale off by two
    Fault("attention scale twice, SigLIP", "vision_encoder", "low.blocks.1",
          node(f"low.blocks.1.attn/{ATTENTION}", attribute("scale", 2 * 32**-0.5))),
    Fault("attention scale half, SAM", "vision_encoder", "high.blocks.1",
          node(f"high.blocks.1.attn/{ATTENTION}", attribute("scale", 0.5 * 32**-0.5))),
    Fault("norm weight twice, decoder", "decoder", "layers.0",
          weight("layers.0.post_attention_layernorm.weight", scaled(2))),
    Fault("final norm half", "decoder", "norm", weight("norm.weight", scaled(0.5))),
    Fault("key scale twice", "decoder", "layers.1",
          weight("layers.1.self_attn.k_proj.weight_transposed", scaled(2))),
    Fault("patch embedding twice", "vision_encoder", "high.patch_embed",
          weight("high.patch_embed.proj.weight", scaled(2))),
    Fault("standard deviation off by two", "vision_encoder", "low_norm",
          weight("low_norm.std", scaled(2))),
    Fault("neck scaled by two", "vision_encoder", "high.neck_hd", weight("high.neck_hd.3.weight", scaled(2))),
]  # fmt: skip
