"""Dialect ``ort``: what ONNX Runtime runs fastest; the one place where its contrib operators are chosen."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from dsvl_export.onnx_graph.builder import element_type
from dsvl_export.onnx_graph.lower import Lowering, arguments, fake, numpy_dtype
from runtimes.contracts import updated_state
from runtimes.errors import UserError


class OrtDialect:
    """Standard operators, and ``GroupQueryAttention`` for the decoder's cache.

    Opset 23 has all of them (RMSNormalization is the newest), and ONNX Runtime 1.23, the last for the
    Python 3.10 of JetPack 6, refuses files that are stamped with a newer one.

    GroupQueryAttention writes the cache in place when a past and its present are bound to the same
    buffer; the standard TensorScatter + Attention pair was slower on CPU by 1.6 times in decode.
    """

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

    def cached_attention(self, context: Lowering, node: Node) -> str:
        query, key, value, positions, cos, sin, keys, values = arguments(node)
        lengths, total = self._lengths(context, context.value(positions))
        head_dim = int(fake(keys).shape[-1])
        if head_dim % 16:
            raise UserError(
                f"ONNX Runtime's GroupQueryAttention needs a head size that is a multiple of 16,"
                f" this decoder has {head_dim}."
            )
        states = [context.value(keys), context.value(values)]
        inputs = [context.value(query), context.value(key), context.value(value), *states,
                  lengths, total, context.value(cos), context.value(sin)]  # fmt: skip
        attributes = {
            "num_heads": int(fake(query).shape[-1]) // head_dim,
            "kv_num_heads": int(fake(keys).shape[1]), "do_rotary": 1,
        }  # fmt: skip
        name = context.graph.unique(f"{context.name(node)}_out")
        outputs = [name, *(updated_state(state) for state in states)]
        return context.graph.node(
            "GroupQueryAttention", inputs, context.name(node), attributes, outputs, "com.microsoft"
        )

    def _lengths(self, context: Lowering, positions: str) -> tuple[str, str]:
        """``seqlens_k [B]`` (cache length after the step, minus one) and the longest length, int32.

        Positions are consecutive in a row, so its last one is that length minus one.
        """
        graph, known = context.graph, context.scratch
        if "lengths" not in known:
            int32 = {"to": element_type(np.dtype(np.int32))}
            last = graph.node("Gather", [positions, graph.constant(np.array(-1, np.int64), "last")],
                              "lengths/last", {"axis": 1})  # fmt: skip
            known["lengths"] = graph.node("Cast", [last], "lengths/each", int32)
            longest = graph.node("ReduceMax", [known["lengths"]], "lengths/longest", {"keepdims": 0})
            one = graph.constant(np.array(1, np.int32), "one")
            known["total"] = graph.node("Add", [longest, one], "lengths/total")
        return known["lengths"], known["total"]
