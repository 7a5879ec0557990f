"""Quantized weights and activations in MIL, with the scales that all backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

import calibration.quantized_program  # noqa: F401 -- registers the operators
from dsvl_export.compilers.lowering import (
    Constant,
    PaletteWeight,
    QuantizedWeight,
    arguments,
    fake_tensor,
    numpy_dtype,
    to_numpy,
)
from dsvl_export.compilers.mil.context import MilLowering, Var

qd = torch.ops.quantized_decomposed
INT8, HALF = np.dtype(np.int8), np.dtype(np.float16)


def _quantize(context: MilLowering, node: Node) -> Var:
    """Quantize an activation; the same input with the same scale is quantized once."""
    x, scale = arguments(node)[:2]
    source, factor = context.value(x), _scalar(context, scale, x)
    key = f"quantized {source.name} {factor}"
    if key not in context.scratch:
        context.scratch[key] = context.emit(
            node, mb.quantize, input=source, scale=factor, output_dtype="int8"
        )
    return context.scratch[key]


def _dequantize(context: MilLowering, node: Node) -> Any:
    """Dequantize an activation; a weight stays quantized until its layer is lowered."""
    source, scale = arguments(node)[:2]
    if context.is_constant(source):
        return context.channel_weight(node, INT8)
    codes, factor = context.value(source), _scalar(context, scale, node)
    key = f"dequantized {codes.name} {factor}"
    if key not in context.scratch:
        context.scratch[key] = context.emit(node, mb.dequantize, input=codes, scale=factor)
    return context.scratch[key]


def _scalar(context: MilLowering, scale: Node, like: Node) -> Any:
    return numpy_dtype(fake_tensor(like).dtype).type(to_numpy(context.constant(scale).load()))


def weight_operand(context: MilLowering, source: Node) -> Var:
    """Add a weight ``[out, in, ...]``, or the codes that Core ML stores and decompresses."""
    weight = context.weight(source)
    if isinstance(weight, Constant):
        return context.value(source)
    name = f"{weight.codes.name}_dense"
    if name not in context.scratch:
        emit = _from_palettes if isinstance(weight, PaletteWeight) else _from_scales
        context.scratch[name] = emit(context, weight, name)
    return context.scratch[name]


def _from_palettes(context: MilLowering, weight: PaletteWeight, name: str) -> Var:
    groups, entries = weight.entries
    lut = (groups, 1, entries, 1)  # for each group of rows, for all columns, entries, of one number
    indices = context.add_constant(
        weight.codes.name, types.np_uint4_dtype, weight.shape,
        lambda: to_numpy(weight.codes.load()).astype(types.np_uint4_dtype),
    )  # fmt: skip
    palettes = context.add_constant(
        weight.palettes.name, HALF, lut, lambda: to_numpy(weight.palettes.load()).astype(HALF).reshape(lut)
    )
    return mb.constexpr_lut_to_dense(indices=indices, lut=palettes, name=context.unique_name(name))


def _from_scales(context: MilLowering, weight: QuantizedWeight, name: str) -> Var:
    rows, columns, *kernel = weight.shape
    groups = columns // weight.group if weight.group else 1
    stored = types.np_int4_dtype if weight.bits == 4 else np.dtype(np.int8)
    scales = (rows, groups, *(1 for _ in kernel))
    data = context.add_constant(
        weight.codes.name, stored, weight.shape, lambda: to_numpy(weight.codes.load()).astype(stored)
    )
    scale = context.add_constant(
        weight.scale.name, HALF, scales, lambda: to_numpy(weight.scale.load()).astype(HALF).reshape(scales)
    )
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=context.unique_name(name))


DEQUANTIZE = frozenset(
    {
        qd.dequantize_per_tensor.tensor,
        qd.dequantize_per_channel.default,
        qd.dequantize_per_channel_group.default,
        torch.ops.dsvl.dequantize_palette.default,
    }
)
QUANTIZATION: dict[Any, Callable[[MilLowering, Node], Any]] = {
    qd.quantize_per_tensor.tensor: _quantize,
    qd.dequantize_per_tensor.tensor: _dequantize,
    qd.dequantize_per_channel.default: _dequantize,
    qd.dequantize_per_channel_group.default: lambda context, node: context.group_weight(node),
    torch.ops.dsvl.dequantize_palette.default: lambda context, node: context.palette_weight(node),
}
