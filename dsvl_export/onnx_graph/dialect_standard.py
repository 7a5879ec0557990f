"""What ONNX itself defines, for the operators that have several forms; other dialects build on it."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from dsvl_export.onnx_graph.context import Lowering, QuantizedWeight, arguments, fake, numpy_dtype
from dsvl_export.onnx_graph.quantization import dequantized


class StandardDialect:
    """Attention as matrix products and a softmax, quantized weights behind DequantizeLinear."""

    opset = 23

    def attention(self, context: Lowering, node: Node) -> str:
        """Softmax attention of the vision towers, optionally with an additive bias."""
        if len(node.args) > 4 or node.kwargs.keys() - {"attn_mask"}:
            raise NotImplementedError("causal, scaled or dropped-out attention in a vision tower")
        *sources, bias = arguments(node, None, None, node.kwargs.get("attn_mask"))[:4]
        query, key, value = (context.value(source) for source in sources)
        name, head_dim = context.name(node), int(fake(sources[0]).shape[-1])
        dtype = numpy_dtype(fake(node).dtype)
        scale = context.graph.constant(np.array(head_dim**-0.5, dtype=dtype), "scale")
        scaled = context.graph.node("Mul", [query, scale], f"{name}_scale")
        swapped = context.graph.node("Transpose", [key], f"{name}_keys", {"perm": [0, 1, 3, 2]})
        scores = context.graph.node("MatMul", [scaled, swapped], f"{name}_scores")
        if bias is not None:
            scores = context.graph.node("Add", [scores, context.value(bias)], f"{name}_bias")
        weights = context.graph.node("Softmax", [scores], f"{name}_softmax", {"axis": -1})
        return context.emit(node, "MatMul", [weights, value])

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """A product with a DequantizeLinear by blocks (4 bits) or by channels (8 bits)."""
        return context.emit(node, "MatMul", [x, dequantized(context, weight, 1)])
