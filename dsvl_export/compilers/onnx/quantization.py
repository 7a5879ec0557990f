"""Quantize and dequantize operators in ONNX, by the rules of TensorRT 11.

Quantization is symmetric, with zero points that are constant zeros. Activations have one scale per
tensor, weights one per output channel or block; scales have the dtype of the tensors that are not
quantized. The quantization of a weight is evaluated, so the file holds its codes behind a
DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

import calibration.quantized_program  # noqa: F401 -- registers the float8 operators
from dsvl_export.compilers.lowering import (
    Constant,
    QuantizedWeight,
    arguments,
    fake_tensor,
    numpy_dtype,
    to_numpy,
)
from dsvl_export.compilers.onnx.context import Lowering

qd, dsvl = torch.ops.quantized_decomposed, torch.ops.dsvl
FOUR_BIT = qd.dequantize_per_channel_group.default
TOKENS = qd.dequantize_per_token.default
INT8, INT4, FLOAT8 = np.dtype(np.int8), np.dtype("int4"), numpy_dtype(torch.float8_e4m3fn)


def _quantize(codes: np.dtype[Any]) -> Callable[[Lowering, Node], str]:
    """Quantize an activation; the same input with the same scale is quantized once."""

    def lower(context: Lowering, node: Node) -> str:
        x, scale = arguments(node)[:2]
        source, factor = (
            context.value(x),
            _scalar(context, context.constant(scale), numpy_dtype(fake_tensor(x).dtype)),
        )
        key = f"quantized {source} {factor} {codes}"
        if key not in context.scratch:
            inputs = [source, factor, _zero(context, codes)]
            context.scratch[key] = context.emit(node, "QuantizeLinear", inputs)
        return context.scratch[key]

    return lower


def _dequantize(codes: np.dtype[Any]) -> Callable[[Lowering, Node], Any]:
    """Dequantize an activation; a weight stays quantized until its layer is lowered."""

    def lower(context: Lowering, node: Node) -> Any:
        source, scale = arguments(node)[:2]
        if context.is_constant(source):
            return context.channel_weight(node, codes)
        factor = _scalar(context, context.constant(scale), numpy_dtype(fake_tensor(node).dtype))
        key = f"dequantized {context.value(source)} {factor}"
        if key not in context.scratch:
            inputs = [context.value(source), factor, _zero(context, codes)]
            context.scratch[key] = context.emit(node, "DequantizeLinear", inputs)
        return context.scratch[key]

    return lower


def _dequantize_groups(context: Lowering, node: Node) -> QuantizedWeight:
    return context.group_weight(node)


def _tokens(context: Lowering, node: Node) -> str:
    """Return the activation itself; the layers that read it quantize it as their dialect does."""
    return context.value(arguments(node)[0])


def _token_ranges(context: Lowering, node: Node) -> list[str]:
    """Return placeholders for each token's scale and zero point, which only ``_tokens`` reads."""
    return ["", ""]


def _scalar(context: Lowering, scale: Constant, dtype: np.dtype[Any]) -> str:
    return context.graph.constant(to_numpy(scale.load()).astype(dtype), "scale")


def _zero(context: Lowering, dtype: np.dtype[Any]) -> str:
    return context.graph.constant(np.zeros((), dtype), "zero")


def quantized_linear(context: Lowering, node: Node, x: Node, weight: QuantizedWeight) -> str:
    """Lower ``x @ W^T`` with a quantized weight."""
    if x.target == TOKENS:
        return context.dialect.dynamic_linear(context, node, context.value(x), weight)
    if x.target not in DEQUANTIZE:
        return context.dialect.weight_only_linear(context, node, context.value(x), weight)
    return context.emit(node, "MatMul", [context.value(x), dequantize_weight(context, weight, 1)])


def dequantize_weight(context: Lowering, weight: QuantizedWeight, axis: int) -> str:
    """Add a weight behind a DequantizeLinear.

    Args:
        context: the lowering.
        weight: the weight.
        axis: axis of the output channels; 1 stores the codes ``[in, out]``, as MatMul reads them.
    """
    graph, codes, scale = context.graph, weight.codes, weight.scale
    turned = axis == 1
    dtype = context.base

    def array(constant: Constant, dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            values = to_numpy(constant.load())
            values = values.T if turned and values.ndim > 1 else values
            return np.ascontiguousarray(values if values.dtype == dtype else values.astype(dtype))

        return load

    def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if turned and len(shape) > 1 else shape

    rows, columns, *_ = (*weight.shape, 1)
    scales = (rows, columns // weight.group) if weight.group else (rows,)
    inputs = [
        graph.initializer(
            f"{codes.name}_codes", weight.dtype, stored(weight.shape), array(codes, weight.dtype)
        ),
        graph.initializer(f"{scale.name}_of_codes", dtype, stored(scales), array(scale, dtype)),
    ]
    attributes = {"axis": 0, "block_size": weight.group} if weight.group else {"axis": axis}
    return graph.node("DequantizeLinear", inputs, f"{codes.name}_dequantized", attributes)


DEQUANTIZE = frozenset(
    {
        qd.dequantize_per_tensor.tensor,
        qd.dequantize_per_channel.default,
        FOUR_BIT,
        dsvl.dequantize_float8.default,
    }
)
QUANTIZATION: dict[Any, Callable[[Lowering, Node], Any]] = {
    qd.quantize_per_tensor.tensor: _quantize(INT8),
    qd.dequantize_per_tensor.tensor: _dequantize(INT8),
    qd.dequantize_per_channel.default: _dequantize(INT8),
    FOUR_BIT: _dequantize_groups,
    qd.choose_qparams_per_token_asymmetric.default: _token_ranges,
    qd.quantize_per_token.default: _tokens,
    TOKENS: _tokens,
    dsvl.quantize_float8.default: _quantize(FLOAT8),
    dsvl.dequantize_float8.default: _dequantize(FLOAT8),
}
