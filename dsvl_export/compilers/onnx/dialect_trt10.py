"""Dialect ``trt10``: primitive operators up to opset 20, for TensorRT 10.3 of JetPack 6."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch.fx import Node

from dsvl_export.compilers.lowering import arguments, fake_tensor, numpy_dtype, to_numpy
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.decoder_parts import cache_slots, merge_heads, rotation_table, split_heads
from dsvl_export.compilers.onnx.dialect_standard import (
    Heads,
    StandardDialect,
    heads_of,
    softmax_attention,
)
from dsvl_export.compilers.onnx.quantization import FOUR_BIT
from reference.trace import TracedComponent
from runtimes.bundle.contracts import TensorSpec, appended_state

FLOAT32 = np.dtype(np.float32)


class Trt10Dialect(StandardDialect):
    """RoPE, RMSNorm and attention in primitives; the graph reads the cache, the session writes it.

    TensorRT 10.3 has no KVCacheUpdate, and a Scatter would copy the whole cache in every step. So
    attention reads the new tokens beside the cache, in one softmax, and returns them as outputs;
    the session copies their rows into the cache. The capacity stays a dynamic dimension.
    """

    float32_norms = True

    def __init__(self, traced: TracedComponent) -> None:
        """Choose opset 21 (DequantizeLinear by blocks) for 4-bit weights, otherwise 20."""
        four_bit = any(node.target is FOUR_BIT for node in traced.program.graph.nodes)
        self.opset = 21 if four_bit else 20

    def state_output(self, state: TensorSpec) -> TensorSpec:
        """Return only the new rows of a state."""
        return appended_state(state)

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str:
        """Add ``x / sqrt(mean(x²) + ε) · w`` (arXiv 1910.07467, eq. 4), in float32."""
        graph = context.graph
        square = graph.node("Mul", [x, x], f"{name}_square")
        mean = graph.node("ReduceMean", [square, graph.ints(-1)], f"{name}_mean")
        shifted = graph.node(
            "Add", [mean, graph.constant(np.array(epsilon, np.float32), "eps")], f"{name}_eps"
        )
        scaled = graph.node("Div", [x, graph.node("Sqrt", [shifted], f"{name}_root")], f"{name}_scaled")
        return graph.node("Mul", [scaled, weight], name)

    def cached_attention(self, context: Lowering, node: Node) -> str:
        """Lower to primitives over the cache and the new tokens.

        The codes of an int8 cache are multiplied without their scales. The keys' scales multiply
        the queries instead, and those of the values the result.
        """
        query, key, value, positions, cos, sin, keys, values, *scales = arguments(node)
        graph, name, heads = context.graph, context.name(node), heads_of(keys)
        quantized = any(scale is not None for scale in scales)
        if quantized:
            heads = replace(heads, dtype=numpy_dtype(fake_tensor(query).dtype))
        angles = [self.angles(context, table, heads, context.value(positions)) for table in (cos, sin)]
        query_heads, key_heads, value_heads = (
            split_heads(context, source, heads, f"{name}_{part}")
            for part, source in (("query", query), ("key", key), ("value", value))
        )
        rotated, new_keys = (
            self._rotate(context, x, angles, f"{name}_rotated_{part}")
            for part, x in (("query", query_heads), ("key", key_heads))
        )
        past, new = [context.value(keys), context.value(values)], [new_keys, value_heads]
        groups = int(fake_tensor(query).shape[-1]) // heads.size // heads.count
        if quantized:
            new = [
                self._codes(context, rows, scale, heads, f"{name}_codes")
                for rows, scale in zip(new, scales, strict=True)
            ]
        for rows, output in zip(new, context.state_outputs(keys, values), strict=True):
            graph.node("Identity", [rows], f"{name}_{output}", outputs=[output])
        if quantized:
            past, new = (
                [context.cast(codes, heads.dtype, f"{name}_float") for codes in block]
                for block in (past, new)
            )
            key_scale, value_scale = (_head_scales(context, scale, heads, groups) for scale in scales)
            rotated = graph.node("Mul", [rotated, key_scale], f"{name}_key_scale")
        past_mask, new_mask = self._masks(context, context.value(positions), context.value(keys))
        blocks = [(past[0], past[1], past_mask), (new[0], new[1], new_mask)]
        out = softmax_attention(context, rotated, blocks, heads, groups, name)
        if quantized:
            out = graph.node("Mul", [out, value_scale], f"{name}_value_scale")
        return merge_heads(context, out, node, heads)

    def _codes(self, context: Lowering, rows: str, scale: Node, heads: Heads, name: str) -> str:
        """Quantize new rows ``[B, Hkv, S, Dh]`` to int8 with a scale per head, in float32.

        QuantizeLinear itself gets the scale 1: TensorRT's rules allow activations no other scale
        per head.
        """
        graph = context.graph
        one, zero = graph.constant(np.array(1, FLOAT32), "one"), graph.constant(np.array(0, np.int8), "zero")
        if heads.dtype != FLOAT32:
            rows, heads = context.cast(rows, FLOAT32, f"{name}_float32"), replace(heads, dtype=FLOAT32)
        scaled = graph.node("Div", [rows, _head_scales(context, scale, heads)], f"{name}_scaled")
        return graph.node("QuantizeLinear", [scaled, one, zero], name)

    def angles(self, context: Lowering, table: Node, heads: Heads, positions: str) -> str:
        """Gather rows ``[B, 1, S, Dh / 2]`` of a RoPE table, once for all layers."""
        graph, scratch, source = context.graph, context.scratch, rotation_table(context, table, heads)
        if source not in scratch:
            rows = graph.node("Gather", [source, positions], f"{source}_rows", {"axis": 0})
            scratch[source] = graph.node("Unsqueeze", [rows, graph.ints(1)], f"{source}_of_heads")
        return scratch[source]

    def _rotate(self, context: Lowering, x: str, angles: list[str], name: str) -> str:
        """Apply RoPE in LLaMA's half-split form to ``[B, H, S, Dh]``."""
        graph = context.graph
        halves = [graph.unique_name(f"{name}_{half}") for half in ("first", "second")]
        graph.node("Split", [x], f"{name}_halves", {"axis": -1, "num_outputs": 2}, outputs=halves)
        (a, b), (cos, sin), turned = halves, angles, []
        for sign, one, other in (("Sub", a, b), ("Add", b, a)):
            kept = graph.node("Mul", [one, cos], f"{name}_cos")
            crossed = graph.node("Mul", [other, sin], f"{name}_sin")
            turned.append(graph.node(sign, [kept, crossed], f"{name}_half"))
        return graph.node("Concat", turned, name, {"axis": -1})

    def _masks(self, context: Lowering, positions: str, cache: str) -> tuple[str, str]:
        """Build the masks of cache slots ``[B, 1, 1, C]`` and new tokens ``[B, 1, S, S]``."""
        graph, scratch = context.graph, context.scratch
        if "mask_new" not in scratch:
            across = graph.node("Unsqueeze", [positions, graph.ints(1, 2)], "positions_across")
            down = graph.node("Unsqueeze", [positions, graph.ints(1, 3)], "positions_down")
            scratch["mask_new"] = graph.node("LessOrEqual", [across, down], "mask_new")
            first = graph.node("Slice", [down, *(graph.ints(v) for v in (0, 1, 2))], "positions_first")
            scratch["mask_past"] = graph.node("Less", [cache_slots(context, cache), first], "mask_past")
        return scratch["mask_past"], scratch["mask_new"]


def _head_scales(context: Lowering, source: Node, heads: Heads, groups: int = 1) -> str:
    """Add scales ``[Hkv]`` of a cache as ``[1, Hkv * groups, 1, 1]``, for heads or query heads."""
    scale = context.constant(source)
    return context.graph.initializer(
        f"{scale.name}_of_{'heads' if groups == 1 else 'query_heads'}_{heads.dtype.name}",
        heads.dtype,
        (1, heads.count * groups, 1, 1),
        lambda: to_numpy(scale.load().float()).repeat(groups).astype(heads.dtype).reshape(1, -1, 1, 1),
    )
