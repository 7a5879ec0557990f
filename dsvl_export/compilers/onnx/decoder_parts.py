"""Parts of the decoder's attention that both TensorRT dialects use."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from dsvl_export.compilers.lowering import fake_tensor, numpy_dtype, to_numpy
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.dialect_standard import Heads


def split_heads(context: Lowering, source: Node, heads: Heads, name: str) -> str:
    """Split heads in the dtype of attention: ``[B, S, H * Dh]`` → ``[B, H, S, Dh]``."""
    graph, x = context.graph, context.value(source)
    if numpy_dtype(fake_tensor(source).dtype) != heads.dtype:
        x = context.cast(x, heads.dtype, f"{name}_cast")
    count = int(fake_tensor(source).shape[-1]) // heads.size
    apart = graph.node("Reshape", [x, graph.ints(0, 0, count, heads.size)], f"{name}_heads")
    return graph.node("Transpose", [apart], name, {"perm": [0, 2, 1, 3]})


def merge_heads(context: Lowering, x: str, node: Node, heads: Heads) -> str:
    """Merge heads into the value of ``node``: ``[B, H, S, Dh]`` → ``[B, S, H * Dh]``."""
    graph, name, dtype = context.graph, context.name(node), numpy_dtype(fake_tensor(node).dtype)
    turned = graph.node("Transpose", [x], f"{name}_tokens", {"perm": [0, 2, 1, 3]})
    out = context.emit(node, "Reshape", [turned, graph.ints(0, 0, int(fake_tensor(node).shape[-1]))])
    return out if heads.dtype == dtype else context.cast(out, dtype, f"{name}_cast")


def rotation_table(context: Lowering, table: Node, heads: Heads) -> str:
    """Add the table of cosines or sines ``[P, Dh / 2]`` in the dtype of attention."""
    constant = context.constant(table)
    return context.graph.initializer(
        f"{constant.name}_table",
        heads.dtype,
        fake_tensor(table).shape,
        lambda: to_numpy(constant.load().float()).astype(heads.dtype),
    )


def cache_slots(context: Lowering, cache: str) -> str:
    """Add the numbers ``[C]`` of the cache's slots."""
    graph, scratch = context.graph, context.scratch
    if "slots" not in scratch:
        shape = graph.node("Shape", [cache], "cache_shape")
        axis = graph.constant(np.array(2, np.int64), "axis")
        capacity = graph.node("Gather", [shape, axis], "capacity_of_cache", {"axis": 0})
        first, step = (graph.constant(np.array(number, np.int64), "number") for number in (0, 1))
        scratch["slots"] = graph.node("Range", [first, capacity, step], "slots")
    return scratch["slots"]


def visible_slots(context: Lowering, positions: str, cache: str) -> str:
    """Build the bool mask ``[B, 1, S, C]`` of slots up to each token's own, once for all layers."""
    graph, scratch = context.graph, context.scratch
    if "visible" not in scratch:
        down = graph.node("Unsqueeze", [positions, graph.ints(1, 3)], "positions_down")
        scratch["visible"] = graph.node("LessOrEqual", [cache_slots(context, cache), down], "visible")
    return scratch["visible"]
