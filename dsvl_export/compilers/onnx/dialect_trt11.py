"""Dialect ``trt11``: ONNX opset 24 for TensorRT 10.15 and later, 11 included."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from dsvl_export.compilers.lowering import arguments, fake_tensor, numpy_dtype
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.decoder_parts import merge_heads, rotation_table, split_heads, visible_slots
from dsvl_export.compilers.onnx.dialect_standard import (
    StandardDialect,
    attention_inputs,
    heads_of,
    softmax_attention,
)

MAX_HEAD_SIZE = 256


class Trt11Dialect(StandardDialect):
    """Attention with an explicit mask, RotaryEmbedding, RMSNormalization, TensorScatter.

    - TensorRT drops Attention's ``nonpad_kv_seqlen`` with only a warning, so a mask limits
      attention.
    - TensorRT refuses an Attention without a fused kernel, so float32 and odd head sizes use matrix
      products.
    - TensorScatter becomes a KVCacheUpdate, whose output must share the memory of its input.
    """

    opset = 24
    float32_norms = True

    def attention(self, context: Lowering, node: Node) -> str:
        """Lower to Attention, or to matrix products if TensorRT has no fused kernel."""
        sources, bias = attention_inputs(node)
        if not _fused(sources[0]):
            return super().attention(context, node)
        inputs = [context.value(source) for source in (*sources, *bias)]
        return context.emit(node, "Attention", inputs, {"scale": heads_of(sources[0]).scale})

    def cached_attention(self, context: Lowering, node: Node) -> str:
        """Lower to RotaryEmbedding, TensorScatter and Attention."""
        query, key, value, positions, cos, sin, keys, values, *_ = arguments(node)
        graph, name = context.graph, context.name(node)
        heads = heads_of(keys)
        tables = [rotation_table(context, table, heads) for table in (cos, sin)]
        rotated = [
            graph.node(
                "RotaryEmbedding",
                [split_heads(context, source, heads, f"{name}_{part}"), *tables, context.value(positions)],
                f"{name}_rotated_{part}",
            )
            for source, part in ((query, "query"), (key, "key"))
        ]
        start = self._start(context, context.value(positions))
        new = (rotated[1], split_heads(context, value, heads, f"{name}_value"))
        cache = [
            graph.node(
                "TensorScatter", [context.value(state), rows, start], f"{name}_{output}", {"axis": -2},
                outputs=[output],
            )
            for state, rows, output in zip(
                (keys, values), new, context.state_outputs(keys, values), strict=True
            )
        ]  # fmt: skip
        mask = visible_slots(context, context.value(positions), context.value(keys))
        if not _fused(keys):
            groups = int(fake_tensor(query).shape[-1]) // heads.size // heads.count
            out = softmax_attention(context, rotated[0], [(cache[0], cache[1], mask)], heads, groups, name)
        else:
            scale = {"scale": heads.scale}
            out = graph.node("Attention", [rotated[0], *cache, mask], f"{name}_attention", scale)
        return merge_heads(context, out, node, heads)

    def _start(self, context: Lowering, positions: str) -> str:
        """Return the slot ``[B]`` of each row's first new token.

        Positions are consecutive in a row.
        """
        scratch = context.scratch
        if "start" not in scratch:
            zero = context.graph.constant(np.array(0, np.int64), "first")
            scratch["start"] = context.graph.node("Gather", [positions, zero], "start", {"axis": 1})
        return scratch["start"]


def _fused(source: Node) -> bool:
    """Return whether TensorRT has a fused kernel for ``[..., Dh]``, also between quantized layers.

    Observed with TensorRT-RTX 1.7.1: half precision, and head sizes in multiples of 16 up to 256;
    smaller ones build unless their neighbors are INT8.
    """
    head_dim, dtype = int(fake_tensor(source).shape[-1]), numpy_dtype(fake_tensor(source).dtype)
    return dtype != np.float32 and head_dim % 16 == 0 and head_dim <= MAX_HEAD_SIZE
