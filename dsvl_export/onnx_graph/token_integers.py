"""Linear layers in 8-bit integers for ONNX Runtime, whose activations are rounded token by token.

A token's codes are unsigned with the zero point 128: ONNX Runtime's kernels are fast for unsigned times
signed, and seventeen times slower for signed times signed (1.32 on AVX512-VNNI).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from dsvl_export.lowering import Constant, QuantizedWeight, to_numpy
from dsvl_export.onnx_graph.context import Lowering

FLOAT32, LARGEST = np.dtype(np.float32), 127
ZERO_POINT = np.array(128, np.uint8)
SMALLEST = np.array(1e-30, np.float32)  # scale of a token of zeros


def integer_linear(context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
    """``x @ W^T`` of codes with a scale for each token and one for each output channel.

    Args:
        x: float32 ``[..., in]``.
        weight: in 8 bits.
    """
    graph, name = context.graph, context.name(node)
    codes, scale = _quantized_tokens(context, x)
    rows, columns = weight.shape
    transposed = graph.initializer(
        f"{weight.codes.name}_transposed", np.dtype(np.int8), (columns, rows),
        lambda: to_numpy(weight.codes.load().t()),
    )  # fmt: skip
    channels = graph.initializer(
        f"{weight.scale.name}_of_channels", FLOAT32, (rows,), lambda: to_numpy(weight.scale.load().float())
    )
    inputs = [codes, transposed, _one(context), channels, graph.constant(ZERO_POINT, "zero_point")]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}_product", domain="com.microsoft")
    return context.emit(node, "Mul", [product, scale])


def in_eight_bits(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight of 4 bits with a scale per group as one of 8 bits with a scale per output channel.

    The rounding that this adds is about a fourteenth of that of the 4 bits where a row's groups are alike
    (RMS, normal weights), and more where one stands out.
    """

    known: list[Tensor] = []  # the scale, once it was needed; the weight itself is not kept

    def values() -> Tensor:
        groups = weight.codes.load().float().unflatten(1, (-1, weight.group))
        return groups.mul_(weight.scale.load().float()[:, :, None]).flatten(1)

    def scale_of(wide: Tensor) -> Tensor:
        if not known:
            low, high = wide.aminmax(dim=1)
            largest = torch.maximum(-low, high) / LARGEST
            known.append(torch.where(largest > 0, largest, torch.ones_like(largest)))
        return known[0]

    def codes() -> Tensor:
        wide = values()
        return wide.div_(scale_of(wide)[:, None]).round_().to(torch.int8)

    return replace(
        weight,
        codes=Constant(f"{weight.codes.name}_in_8_bits", codes),
        scale=Constant(f"{weight.scale.name}_in_8_bits", lambda: known[0] if known else scale_of(values())),
        bits=8,
        dtype=np.dtype(np.int8),
        group=None,
    )


def _quantized_tokens(context: Lowering, x: str) -> tuple[str, str]:
    """Codes of ``x [..., in]`` and their scales ``[..., 1]``, once for all layers that read it."""
    graph, key = context.graph, f"tokens of {x}"
    if key not in context.scratch:
        magnitude = graph.node("Abs", [x], f"{x}_magnitude")
        largest = graph.node("ReduceMax", [magnitude, graph.ints(-1)], f"{x}_largest", {"keepdims": 1})
        share = graph.constant(np.array(1 / LARGEST, np.float32), "share")
        scale = graph.node("Mul", [largest, share], f"{x}_share")
        scale = graph.node("Max", [scale, graph.constant(SMALLEST, "smallest")], f"{x}_scale")
        scaled = graph.node("Div", [x, scale], f"{x}_scaled")
        inputs = [scaled, _one(context), graph.constant(ZERO_POINT, "zero_point")]
        context.scratch[key] = (graph.node("QuantizeLinear", inputs, f"{x}_codes"), scale)
    found: tuple[str, str] = context.scratch[key]
    return found


def _one(context: Lowering) -> str:
    return context.graph.constant(np.array(1, np.float32), "one")
