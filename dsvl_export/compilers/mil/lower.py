"""Lower an ExportedProgram to a MIL function, with one Python function per operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from torch.fx import Node

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.lowering import (
    arguments,
    aten,
    fake_tensor,
    numpy_dtype,
    permuted_axes,
    swapped_axes,
)
from dsvl_export.compilers.mil.attention import attention, cached_attention, rms_norm
from dsvl_export.compilers.mil.context import MAX_RANK, MIL_NAMES, MilLowering, Var, Weights
from dsvl_export.compilers.mil.quantization import DEQUANTIZE, QUANTIZATION, weight_operand
from reference.trace import TracedComponent


def _reshape(context: MilLowering, node: Node) -> Var:
    shape = context.shape(node)
    if shape.count(-1) > 1:
        raise NotImplementedError(f"{context.name(node)} leaves two flexible dims to infer")
    return context.emit(node, mb.reshape, x=context.value(arguments(node)[0]), shape=shape)


def _linear(context: MilLowering, node: Node) -> Var:
    x, weight, bias = arguments(node, None, None)
    dense = weight_operand(context, weight)
    if bias is None:  # coremltools would write zeros for every layer
        width, dtype = int(fake_tensor(node).shape[-1]), numpy_dtype(fake_tensor(node).dtype)
        offset = context.add_constant(f"no_bias_{width}", dtype, (width,), lambda: np.zeros(width, dtype))
    else:
        offset = context.value(bias)
    return context.emit(node, mb.linear, x=context.value(x), weight=dense, bias=offset)


def _conv2d(context: MilLowering, node: Node) -> Var:
    x, weight, bias, stride, padding, dilation, groups = arguments(
        node, None, None, [1, 1], [0, 0], [1, 1], 1
    )
    return context.emit(
        node, mb.conv,
        x=context.value(x), weight=weight_operand(context, weight),
        **({} if bias is None else {"bias": context.value(bias)}),
        strides=stride, pad_type="custom", pad=[side for side in padding for _ in range(2)],
        dilations=dilation, groups=groups,
    )  # fmt: skip


def _layer_norm(context: MilLowering, node: Node) -> Var:
    x, normalized, weight, bias, epsilon = arguments(node)[:5]
    if len(normalized) != 1:
        raise NotImplementedError("LayerNorm over more than the last axis")
    return context.emit(
        node, mb.layer_norm, x=context.value(x), axes=[-1], gamma=context.value(weight),
        beta=context.value(bias), epsilon=context.number(epsilon, node),
    )  # fmt: skip


def _gelu(context: MilLowering, node: Node) -> Var:
    form = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[str(node.kwargs.get("approximate", "none"))]
    return context.emit(node, mb.gelu, x=context.value(arguments(node)[0]), mode=form)


def _silu(context: MilLowering, node: Node) -> Var:
    return context.emit(node, mb.silu, x=context.value(arguments(node)[0]))


def _binary(operator: Callable[..., Var]) -> Callable[[MilLowering, Node], Var]:
    def lower(context: MilLowering, node: Node) -> Var:
        if node.kwargs.get("alpha", 1) != 1:
            raise NotImplementedError(f"{node.target} with alpha")
        return context.emit(node, operator, x=context.operand(node, 0), y=context.operand(node, 1))

    return lower


def _permutation(order: Callable[[Node], list[int]]) -> Callable[[MilLowering, Node], Var]:
    def lower(context: MilLowering, node: Node) -> Var:
        axes = order(node)
        if len(axes) > MAX_RANK:  # the first two are one axis
            if axes[:2] != [0, 1]:
                raise NotImplementedError(f"{context.name(node)} moves one of the first two of six axes")
            axes = [0, *(axis - 1 for axis in axes[2:])]
        return context.emit(node, mb.transpose, x=context.value(arguments(node)[0]), perm=axes)

    return lower


def _chunk(context: MilLowering, node: Node) -> list[Var]:
    x, _, axis = arguments(node, 0, 0)
    sizes = [int(part.shape[axis]) for part in fake_tensor(node)]
    return list(context.emit(node, mb.split, x=context.value(x), split_sizes=sizes, axis=axis))


def _slice(context: MilLowering, node: Node) -> Var:
    x, axis, start, end = arguments(node, 0, None, None)[:4]
    if (start or 0) == 0 and end is None:
        return context.value(x)
    shape = context.shape(x)
    begin, stop, rest = [0] * len(shape), [0] * len(shape), [True] * len(shape)
    begin[axis] = start or 0
    if end is not None and (shape[axis] < 0 or end < shape[axis]):
        stop[axis], rest[axis] = end, False
    return context.emit(
        node, mb.slice_by_index, x=context.value(x), begin=begin, end=stop,
        begin_mask=[value == 0 for value in begin], end_mask=rest,
    )  # fmt: skip


def _pad(context: MilLowering, node: Node) -> Var:
    """PyTorch pads from the last axis backward; MIL lists the two sides of each axis, in order."""
    x, amounts = arguments(node)[:2]
    sides: list[int] = []
    for last in range(len(amounts), 0, -2):
        sides += amounts[last - 2 : last]
    sides = [0] * (2 * fake_tensor(x).dim() - len(sides)) + sides
    return context.emit(
        node, mb.pad, x=context.value(x), pad=sides, mode="constant", constant_val=context.number(0, node)
    )


def _cat(context: MilLowering, node: Node) -> Var:
    parts, axis = arguments(node, 0)
    return context.emit(node, mb.concat, values=[context.value(part) for part in parts], axis=axis)


def _index_select(context: MilLowering, node: Node) -> Var:
    x, axis, index = arguments(node)
    return context.emit(node, mb.gather, x=context.value(x), indices=context.value(index), axis=axis)


def _cast(context: MilLowering, node: Node) -> Var:
    source, dtype = arguments(node)[0], fake_tensor(node).dtype
    if fake_tensor(source).dtype == dtype:
        return context.value(source)
    return context.emit(node, mb.cast, x=context.value(source), dtype=MIL_NAMES[str(numpy_dtype(dtype))])


TABLE: dict[Any, Callable[[MilLowering, Node], Any]] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.matmul.default: _binary(mb.matmul),
    aten.add.Tensor: _binary(mb.add),
    aten.sub.Tensor: _binary(mb.sub),
    aten.mul.Tensor: _binary(mb.mul),
    aten.div.Tensor: _binary(mb.real_div),
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.transpose.int: _permutation(swapped_axes),
    aten.permute.default: _permutation(permuted_axes),
    aten.chunk.default: _chunk,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.index_select.default: _index_select,
    aten.to.dtype: _cast,
    aten.scaled_dot_product_attention.default: attention,
    torch.ops.dsvl.cached_attention.default: cached_attention,
    **QUANTIZATION,
}


def lower(
    traced: TracedComponent,
    load: LoadParameter,
    weights: Weights,
    inputs: Mapping[str, Var],
    sizes: Mapping[str, int],
) -> MilLowering:
    """Lower a traced component into the MIL function that is open; see ``MilLowering``."""
    lowering = MilLowering(traced, load, weights, inputs, sizes, TABLE, DEQUANTIZE)
    lowering.lower_program()
    return lowering
