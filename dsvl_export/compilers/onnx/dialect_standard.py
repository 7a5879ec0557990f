"""The ONNX standard's own operators where several forms exist; other dialects extend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import finfo
from torch.fx import Node

from dsvl_export.compilers.lowering import QuantizedWeight, arguments, fake_tensor, numpy_dtype
from dsvl_export.compilers.onnx.builder import Graph
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.quantization import dequantize_weight
from runtimes.bundle.contracts import TensorSpec, updated_state


@dataclass(frozen=True)
class Heads:
    """The heads of keys and values, and the dtype in which attention computes.

    Args:
        count: number of heads.
        size: channels of a head.
        dtype: of queries, keys, values and scores.
    """

    count: int
    size: int
    dtype: np.dtype[Any]

    @property
    def scale(self) -> float:
        """The factor of the scores, ``size ** -0.5``."""
        return float(self.size**-0.5)


def heads_of(source: Node) -> Heads:
    """Return the heads of a node ``[B, H, T, Dh]`` of the program."""
    tensor = fake_tensor(source)
    return Heads(int(tensor.shape[1]), int(tensor.shape[-1]), numpy_dtype(tensor.dtype))


class StandardDialect:
    """Attention as matrix products and a softmax, quantized weights behind DequantizeLinear."""

    opset = 23
    float32_norms = False
    takes_adapters = False

    def opset_of(self, graph: Graph) -> int:
        """Return the dialect's opset."""
        return self.opset

    def state_output(self, state: TensorSpec) -> TensorSpec:
        """Return the whole updated state."""
        return updated_state(state)

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str:
        """Add RMSNormalization over the last axis."""
        return context.graph.node("RMSNormalization", [x, weight], name, {"axis": -1, "epsilon": epsilon})

    def attention(self, context: Lowering, node: Node) -> str:
        """Lower the softmax attention of the vision towers, with or without an additive bias."""
        (query, key, value), bias = attention_inputs(node)
        name, (q, k, v) = context.name(node), map(context.value, (query, key, value))
        scores = _scores(context, q, k, heads_of(query), name)
        for addend in bias:
            scores = context.graph.node("Add", [scores, context.value(addend)], f"{name}_bias")
        weights = context.graph.node("Softmax", [scores], f"{name}_softmax", {"axis": -1})
        return context.emit(node, "MatMul", [weights, v])

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower to a product with a DequantizeLinear by blocks (4 bits) or by channels (8 bits)."""
        return context.emit(node, "MatMul", [x, dequantize_weight(context, weight, 1)])

    def dynamic_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Raise NotImplementedError: the ONNX standard has no efficient form.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{context.name(node)} with activations in 8 bits, token by token")


def attention_inputs(node: Node) -> tuple[list[Node], list[Node]]:
    """Return query, key and value of a scaled_dot_product_attention, and its bias in a list.

    Raises:
        NotImplementedError: it is causal, or has another scale or dropout.
    """
    if len(node.args) > 4 or node.kwargs.keys() - {"attn_mask"}:
        raise NotImplementedError("causal, scaled or dropped-out attention in a vision tower")
    bias = arguments(node, None, None, node.kwargs.get("attn_mask"))[3]
    return list(node.args[:3]), [] if bias is None else [bias]  # type: ignore[arg-type]


def primitive_rms_norm(context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str:
    """Add ``x / sqrt(mean(x²) + ε) · w`` (arXiv 1910.07467, eq. 4) for ONNX Runtime's fusion."""
    graph = context.graph
    square = graph.node("Pow", [x, graph.constant(np.array(2, np.float32), "two")], f"{name}_square")
    mean = graph.node("ReduceMean", [square, graph.ints(-1)], f"{name}_mean")
    shifted = graph.node("Add", [mean, graph.constant(np.array(epsilon, np.float32), "eps")], f"{name}_eps")
    scaled = graph.node("Div", [x, graph.node("Sqrt", [shifted], f"{name}_root")], f"{name}_scaled")
    return graph.node("Mul", [scaled, weight], name)


def softmax_attention(
    context: Lowering,
    query: str,
    blocks: Sequence[tuple[str, str, str]],
    heads: Heads,
    groups: int,
    name: str,
) -> str:
    """Add attention ``[B, H, S, Dh]`` over several blocks of keys and values, with one softmax.

    Args:
        context: the lowering.
        query: ``[B, H, S, Dh]``.
        blocks: keys and values ``[B, Hkv, T, Dh]``, and a bool mask that broadcasts to ``[B, H, S,
            T]``.
        heads: the heads of keys and values.
        groups: query heads per head of keys and values.
        name: prefix of the nodes' names.
    """
    graph = context.graph
    lowest = graph.constant(np.array(finfo(heads.dtype).min, heads.dtype), "lowest")

    def grouped(x: str, what: str) -> str:
        """An axis for the groups of query heads, where there are any."""
        return graph.node("Unsqueeze", [x, graph.ints(2)], f"{name}_{what}") if groups > 1 else x

    if groups > 1:
        shape = graph.ints(0, heads.count, groups, -1, heads.size)
        query = graph.node("Reshape", [query, shape], f"{name}_grouped")
    masked = []
    for keys, _, mask in blocks:
        scores = _scores(context, query, grouped(keys, "keys"), heads, name, groups > 1)
        masked.append(graph.node("Where", [grouped(mask, "mask"), scores, lowest], f"{name}_masked"))
    joined = graph.node("Concat", masked, f"{name}_joined", {"axis": -1}) if len(blocks) > 1 else masked[0]
    weights = [graph.node("Softmax", [joined], f"{name}_softmax", {"axis": -1})]
    if len(blocks) > 1:
        weights = _apart(context, weights[0], [keys for keys, *_ in blocks], name)
    parts = [
        graph.node("MatMul", [weight, grouped(values, "values")], f"{name}_values")
        for weight, (_, values, _) in zip(weights, blocks, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else graph.node("Add", parts, f"{name}_sum")
    if groups > 1:
        shape = graph.ints(0, heads.count * groups, -1, heads.size)
        out = graph.node("Reshape", [out, shape], f"{name}_ungrouped")
    return out


def _scores(context: Lowering, query: str, keys: str, heads: Heads, name: str, grouped: bool = False) -> str:
    """Add ``q · kᵀ · scale``; scales the queries first, to avoid overflow in half precision."""
    graph = context.graph
    factor = graph.constant(np.array(heads.scale, heads.dtype), "scale")
    scaled = graph.node("Mul", [query, factor], f"{name}_scale")
    order = [0, 1, 2, 4, 3] if grouped else [0, 1, 3, 2]
    swapped = graph.node("Transpose", [keys], f"{name}_keys", {"perm": order})
    return graph.node("MatMul", [scaled, swapped], f"{name}_scores")


def _apart(context: Lowering, weights: str, keys: Sequence[str], name: str) -> list[str]:
    """Split weights of two blocks where the first block's keys end."""
    graph, scratch = context.graph, context.scratch
    if "first_block" not in scratch:
        shape = graph.node("Shape", [keys[0]], "first_block_shape")
        scratch["first_block"] = graph.node("Gather", [shape, graph.ints(2)], "first_block", {"axis": 0})
    end = graph.ints(np.iinfo(np.int64).max)
    bounds = ((graph.ints(0), scratch["first_block"]), (scratch["first_block"], end))
    return [
        graph.node("Slice", [weights, start, stop, graph.ints(-1)], f"{name}_weights")
        for start, stop in bounds
    ]
