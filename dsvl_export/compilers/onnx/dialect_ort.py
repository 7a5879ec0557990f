"""Dialect ``ort``: the operators that ONNX Runtime runs fastest, its contrib operators included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.fx import Node

from calibration.sensitivity import INT8_BLOCK
from dsvl_export.compilers.lowering import (
    QuantizedWeight,
    arguments,
    aten,
    fake_tensor,
    numpy_dtype,
    swapped_axes,
    to_numpy,
)
from dsvl_export.compilers.onnx.builder import Graph, element_type
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.dialect_standard import (
    StandardDialect,
    attention_inputs,
    primitive_rms_norm,
)
from dsvl_export.compilers.onnx.token_integers import integer_linear, widen_to_int8
from runtimes.errors import UserError

# MatMulNBits' accuracy_level: what it rounds activations to.
FLOAT_ACTIVATIONS, INT8_ACTIVATIONS = 1, 4
# Scores of a block of queries. SAM-B has 201 million, for 4,096 tokens: in blocks of 25 million,
# its encoder takes 1.0 GB instead of 2.6 GB in fp32, in the same time.
MAX_BLOCK_SCORES = 1 << 25
FLOAT32 = np.dtype(np.float32)
WITHOUT_RMS_NORM = 21  # the opset of everything else


class OrtDialect(StandardDialect):
    """Standard operators, ``MatMulNBits`` for 4- and 8-bit weights, ``GroupQueryAttention``.

    GroupQueryAttention writes the cache in place if a past and its present are bound to the same
    buffer; the standard pair TensorScatter and Attention was 1.6 times slower in decode on CPU.
    """

    def __init__(self, takes_adapters: bool = False) -> None:
        """Write a graph with or without the inputs of LoRA adapters."""
        self.takes_adapters = takes_adapters

    def opset_of(self, graph: Graph) -> int:
        """Return the oldest opset that can express a graph, for older ONNX Runtime releases."""
        operators = {node.op_type for node in graph.nodes}
        return self.opset if "RMSNormalization" in operators else WITHOUT_RMS_NORM

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str:
        """Add RMSNormalization, or primitives that ONNX Runtime fuses if activations are quantized.

        RMSNormalization needs opset 23, for whose QuantizeLinear ONNX Runtime 1.23 has no kernel
        (https://github.com/microsoft/onnxruntime/issues/25932). That release is the last for Python
        3.10, which JetPack 6 has.
        """
        if not context.rounds_activations:
            return super().rms_norm(context, x, weight, epsilon, name)
        if context.base == FLOAT32:
            return primitive_rms_norm(context, x, weight, epsilon, name)
        # Squares of half precision end at 65,504.
        wide = [context.cast(value, FLOAT32, f"{value}_float32") for value in (x, weight)]
        out = primitive_rms_norm(context, wide[0], wide[1], epsilon, f"{name}_wide")
        return context.cast(out, context.base, name)

    def attention(self, context: Lowering, node: Node) -> str:
        """Lower to ``MultiHeadAttention``, which adds a bias to the product of queries and keys.

        Its inputs and outputs are ``[B, T, H * Dh]``, so that the program's transposes around it
        are not needed.
        """
        operands, bias = attention_inputs(node)
        heads, name, graph = int(fake_tensor(operands[0]).shape[1]), context.name(node), context.graph
        query, key, value = (self._before_heads(context, source) for source in operands)
        parts = [
            graph.node(
                "MultiHeadAttention",
                [queries, key, value, *(["", "", added] if added else [])],
                f"{name}_joined",
                {"num_heads": heads},
                domain="com.microsoft",
            )
            for queries, added in _query_blocks(context, query, bias)
        ]
        joined = graph.node("Concat", parts, f"{name}_whole", {"axis": 1}) if len(parts) > 1 else parts[0]
        split = graph.node(
            "Reshape", [joined, graph.ints(0, 0, heads, int(fake_tensor(node).shape[-1]))], f"{name}_split"
        )
        return context.emit(node, "Transpose", [split], {"perm": [0, 2, 1, 3]})

    def _before_heads(self, context: Lowering, source: Node) -> str:
        """Return as ``[B, T, H * Dh]`` what the program has as ``[B, H, T, Dh]``.

        Raises:
            NotImplementedError: the node is not made by splitting heads and exchanging axes.
        """
        if source.target == aten.transpose.int and swapped_axes(source) == [0, 2, 1, 3]:
            split = arguments(source)[0]
            if split.target == aten.unflatten.int:
                return context.value(arguments(split)[0])
        raise NotImplementedError(f"no MultiHeadAttention of {source}")

    def cached_attention(self, context: Lowering, node: Node) -> str:
        """Lower to ``GroupQueryAttention``.

        Raises:
            UserError: the head size is not a multiple of 16.
        """
        query, key, value, positions, cos, sin, keys, values, *scales = arguments(node)
        lengths, total = self._lengths(context, context.value(positions))
        head_dim = int(fake_tensor(keys).shape[-1])
        if head_dim % 16:
            raise UserError(
                f"ONNX Runtime's GroupQueryAttention needs a head size that is a multiple of 16,"
                f" this decoder has {head_dim}."
            )
        states = [context.value(keys), context.value(values)]
        inputs = [context.value(query), context.value(key), context.value(value), *states,
                  lengths, total, context.value(cos), context.value(sin)]  # fmt: skip
        attributes: dict[str, Any] = {
            "num_heads": int(fake_tensor(query).shape[-1]) // head_dim,
            "kv_num_heads": int(fake_tensor(keys).shape[1]), "do_rotary": 1,
        }  # fmt: skip
        if any(scale is not None for scale in scales):
            inputs += ["", "", "", *(self._cache_scale(context, scale, head_dim) for scale in scales)]
            kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            attributes |= kinds
        name = context.graph.unique_name(f"{context.name(node)}_out")
        outputs = [name, *context.state_outputs(keys, values)]
        return context.graph.node(
            "GroupQueryAttention", inputs, context.name(node), attributes, outputs, "com.microsoft"
        )

    def _cache_scale(self, context: Lowering, source: Node, head_dim: int) -> str:
        """Add a scale per head ``[Hkv]`` as a scale per channel ``[Hkv * Dh]`` float32."""
        scale = context.constant(source)
        size = int(fake_tensor(source).shape[0]) * head_dim
        return context.graph.initializer(
            f"{scale.name}_of_channels", np.dtype(np.float32), (size,),
            lambda: to_numpy(scale.load().float().repeat_interleave(head_dim)),
        )  # fmt: skip

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower to ``MatMulNBits`` with float activations."""
        return self._blocks(context, node, x, weight, FLOAT_ACTIVATIONS)

    def dynamic_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower 8-bit weights to integer products, 4-bit weights to ``MatMulNBits``.

        ``MatMulNBits`` quantizes activations in blocks, which is finer than per token.
        """
        if weight.bits == 8:
            return integer_linear(context, node, x, weight)
        return self._blocks(context, node, x, weight, INT8_ACTIVATIONS)

    def _blocks(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight, accuracy: int) -> str:
        """Add a ``MatMulNBits``, whose codes have an offset.

        Of two 4-bit codes in a byte, the lower half is first.

        A scale per output channel is repeated for blocks of ``INT8_BLOCK`` inputs.
        """
        rows, columns = weight.shape
        block = weight.group or INT8_BLOCK
        if block < 16 or block & (block - 1):
            raise UserError(
                f"ONNX Runtime's MatMulNBits needs groups of a power of two from 16 on, {weight.codes.name}"
                f" has groups of {block}."
            )
        blocks = -(-columns // block)

        def codes() -> np.ndarray:
            offset = 1 << (weight.bits - 1)
            padded = np.full((rows, blocks * block), offset, np.uint8)
            padded[:, :columns] = to_numpy(weight.codes.load()).view(np.uint8) + np.uint8(offset)
            packed = padded[:, ::2] | (padded[:, 1::2] << 4) if weight.bits == 4 else padded
            return np.asarray(packed, np.uint8).reshape(rows, blocks, -1)

        def scales() -> np.ndarray:
            scale = to_numpy(weight.scale.load()).astype(dtype).reshape(rows, -1)
            return np.ascontiguousarray(np.broadcast_to(scale, (rows, blocks)))

        graph, name, dtype = context.graph, weight.codes.name, numpy_dtype(fake_tensor(node).dtype)
        shape = (rows, blocks, block * weight.bits // 8)
        inputs = [
            x,
            graph.initializer(name, np.dtype(np.uint8), shape, codes),
            graph.initializer(f"{weight.scale.name}_of_blocks", dtype, (rows, blocks), scales),
        ]
        attributes = {
            "K": columns, "N": rows, "bits": weight.bits, "block_size": block, "accuracy_level": accuracy,
        }  # fmt: skip
        return graph.node("MatMulNBits", inputs, context.name(node), attributes, domain="com.microsoft")

    def _lengths(self, context: Lowering, positions: str) -> tuple[str, str]:
        """Return ``seqlens_k [B]``, the length after the step minus one, and the largest length.

        Both are int32. Positions are consecutive in a row; the last is that length minus one.
        """
        graph, scratch = context.graph, context.scratch
        if "lengths" not in scratch:
            int32 = {"to": element_type(np.dtype(np.int32))}
            last = graph.node("Gather", [positions, graph.constant(np.array(-1, np.int64), "last")],
                              "lengths/last", {"axis": 1})  # fmt: skip
            scratch["lengths"] = graph.node("Cast", [last], "lengths/each", int32)
            longest = graph.node("ReduceMax", [scratch["lengths"]], "lengths/longest", {"keepdims": 0})
            one = graph.constant(np.array(1, np.int32), "one")
            scratch["total"] = graph.node("Add", [longest, one], "lengths/total")
        return scratch["lengths"], scratch["total"]


class OrtPrefillDialect(OrtDialect):
    """The dialect for prefill, where 4-bit weights are widened to 8 bits ahead of time.

    ``MatMulNBits`` is optimized for one token; for several hundred, products of 8-bit integers are
    twice as fast.
    """

    def dynamic_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower to integer products, except for the head, whose input has only the needed rows."""
        *_, tokens, _ = fake_tensor(node).shape
        if weight.bits == 8 or tokens != context.first_input.shape[1]:  # the head
            return super().dynamic_linear(context, node, x, weight)
        return integer_linear(context, node, x, widen_to_int8(weight))


def sum_of_positions(bias: Node) -> Node | None:
    """Find the node in a bias that adds row and column terms; None if there is none.

    The terms are ``[B, H, n, n, kh, 1]`` and ``[B, H, n, n, 1, kw]``.
    """
    while bias.target == aten.flatten.using_ints:
        bias = arguments(bias)[0]
    return bias if bias.target == aten.add.Tensor and fake_tensor(bias).dim() == 6 else None


def _query_blocks(context: Lowering, query: str, bias: list[Node]) -> list[tuple[str, str]]:
    """Split queries ``[B, t, H * Dh]`` and their bias ``[B, H, t, T]`` into blocks.

    A block is some rows of the grid. There is one block unless all scores at once would be too many
    and the bias is a sum of row and column terms. The bias is empty if there is none.
    """
    if not bias:
        return [(query, "")]
    _, *scores = fake_tensor(bias[0]).shape
    source = sum_of_positions(bias[0])
    least = math.ceil(math.prod(map(int, scores)) / MAX_BLOCK_SCORES)
    if least == 1 or source is None:
        return [(query, context.value(bias[0]))]
    rows = int(fake_tensor(source).shape[2])
    count = next(count for count in range(min(least, rows), rows + 1) if rows % count == 0)
    graph, name = context.graph, context.name(bias[0])

    def blocks(value: str, axis: int) -> list[str]:
        outputs = [graph.unique_name(f"{name}_block") for _ in range(count)]
        graph.node("Split", [value], f"{name}_blocks", {"axis": axis, "num_outputs": count}, outputs)
        return outputs

    of_rows, of_columns = (blocks(context.value(part), 2) for part in arguments(source)[:2])
    sums = [graph.node("Add", pair, f"{name}_sum") for pair in zip(of_rows, of_columns, strict=True)]
    flat = graph.ints(0, 0, -1, int(scores[-1]))
    added = [graph.node("Reshape", [each, flat], f"{name}_flat") for each in sums]
    return list(zip(blocks(query, 1), added, strict=True))
