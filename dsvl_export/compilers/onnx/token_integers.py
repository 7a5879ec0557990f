"""Linear layers in 8-bit integers for ONNX Runtime, with activations quantized per token.

Each token has its own scale and zero point, as in the traced program. Its codes are unsigned around
128: ONNX Runtime's kernels are fast for unsigned times signed, and seventeen times slower for
signed times signed (1.32 on AVX512-VNNI).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from dsvl_export.compilers.lowering import Constant, QuantizedWeight, to_numpy
from dsvl_export.compilers.onnx.context import Lowering

FLOAT32, LARGEST = np.dtype(np.float32), 127
MIDDLE = np.array(128, np.uint8)  # what stands for the code 0
SMALLEST = float(np.finfo(np.float32).eps)  # scale of a token of zeros, as the program has it


def integer_linear(context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
    """Lower ``x @ W^T`` to an integer product of codes.

    With codes q, a scale s and a zero point z per token: ``s · (q - z) @ W^T = s · (q @ W^T - z ·
    sum(W))``. The weight has a scale per channel.

    Args:
        context: the lowering.
        node: the linear layer.
        x: float32 ``[..., in]``.
        weight: in 8 bits.
    """
    graph, name = context.graph, context.name(node)
    codes, scale, zero = _quantized_tokens(context, x)
    rows, columns = weight.shape
    transposed = graph.initializer(
        f"{weight.codes.name}_transposed", np.dtype(np.int8), (columns, rows),
        lambda: to_numpy(weight.codes.load().t()),
    )  # fmt: skip
    channels = graph.initializer(
        f"{weight.scale.name}_of_channels", FLOAT32, (rows,), lambda: to_numpy(weight.scale.load().float())
    )
    sums = graph.initializer(
        f"{weight.codes.name}_sums", FLOAT32, (rows,),
        lambda: to_numpy(weight.codes.load().sum(dim=1) * weight.scale.load().float()),
    )  # fmt: skip
    inputs = [codes, transposed, _number(context, 1), channels, graph.constant(MIDDLE, "middle")]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}_product", domain="com.microsoft")
    shift = graph.node("Mul", [zero, sums], f"{name}_shift")
    shifted = graph.node("Sub", [product, shift], f"{name}_shifted")
    return context.emit(node, "Mul", [shifted, scale])


def widen_to_int8(weight: QuantizedWeight) -> QuantizedWeight:
    """Requantize a 4-bit weight with a scale per group to 8 bits with a scale per output channel.

    The added rounding error is about a fourteenth of that of 4 bits if the groups of a row are
    alike (RMS, normal weights), and larger if one group is an outlier.
    """
    scales: list[Tensor] = []  # the scale, once it was needed; the weight itself is not kept

    def values() -> Tensor:
        groups = weight.codes.load().float().unflatten(1, (-1, weight.group))
        return groups.mul_(weight.scale.load().float()[:, :, None]).flatten(1)

    def scale_of(wide: Tensor) -> Tensor:
        if not scales:
            low, high = wide.aminmax(dim=1)
            largest = torch.maximum(-low, high) / LARGEST
            scales.append(torch.where(largest > 0, largest, torch.ones_like(largest)))
        return scales[0]

    def codes() -> Tensor:
        wide = values()
        return wide.div_(scale_of(wide)[:, None]).round_().to(torch.int8)

    return replace(
        weight,
        codes=Constant(f"{weight.codes.name}_in_8_bits", codes),
        scale=Constant(f"{weight.scale.name}_in_8_bits", lambda: scales[0] if scales else scale_of(values())),
        bits=8,
        dtype=np.dtype(np.int8),
        group=None,
    )


def _quantized_tokens(context: Lowering, x: str) -> tuple[str, str, str]:
    """Quantize ``x [..., in]`` per token, once for all layers that read it.

    As ``choose_qparams_per_token_asymmetric``: from the smallest to the largest number, 0 included,
    in 255 steps.

    Returns:
        Codes, and scales and zero points ``[..., 1]``.
    """
    graph, key = context.graph, f"tokens of {x}"
    if key not in context.scratch:
        ends = []
        for reduce, keep, what in (("ReduceMin", "Min", "least"), ("ReduceMax", "Max", "largest")):
            end = graph.node(reduce, [x, graph.ints(-1)], f"{x}_{what}_alone", {"keepdims": 1})
            ends.append(graph.node(keep, [end, _number(context, 0)], f"{x}_{what}"))
        width = graph.node("Sub", ends[::-1], f"{x}_width")
        step = graph.node("Div", [width, _number(context, 255)], f"{x}_step")
        scale = graph.node("Max", [step, _number(context, SMALLEST)], f"{x}_scale")
        steps = graph.node("Div", [ends[0], scale], f"{x}_steps")
        zero = graph.node(
            "Round", [graph.node("Sub", [_number(context, -128), steps], f"{x}_start")], f"{x}_zero"
        )
        scaled = graph.node("Div", [x, scale], f"{x}_scaled")
        placed = graph.node("Add", [scaled, zero], f"{x}_placed")
        inputs = [placed, _number(context, 1), graph.constant(MIDDLE, "middle")]
        context.scratch[key] = (graph.node("QuantizeLinear", inputs, f"{x}_codes"), scale, zero)
    found: tuple[str, str, str] = context.scratch[key]
    return found


def _number(context: Lowering, value: float) -> str:
    return context.graph.constant(np.array(value, np.float32), "number")
