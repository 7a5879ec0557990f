"""Core AI's operators for quantized weights and activations, in place of this package's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.fx import Node

import calibration.quantized_program  # noqa: F401 -- registers the operators
from dsvl_export.compilers.aten_program import AtenLowering, Lower
from dsvl_export.compilers.lowering import Constant, PaletteWeight, arguments, aten, fake_tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it takes 2.13.0+cpu for something newer than 2.13.0
    import coreai_torch
    import coreai_torch._compression.custom_layers  # noqa: F401 -- registers torch.ops.coreai

qd, coreai = torch.ops.quantized_decomposed, torch.ops.coreai
INT8 = np.dtype(np.int8)


def _quantize(lowering: AtenLowering, node: Node) -> Node:
    x, scale = arguments(node)[:2]
    factor = _scale(lowering, scale, x)
    return lowering.call(coreai.quantize.default, lowering.value(x), factor, torch.int8)


def _dequantize(lowering: AtenLowering, node: Node) -> Any:
    source, scale = arguments(node)[:2]
    if lowering.is_constant(source):
        return lowering.channel_weight(node, INT8)
    codes, factor = lowering.value(source), _scale(lowering, scale, node)
    return lowering.call(coreai.dequantize.default, codes, factor)


def _scale(lowering: AtenLowering, source: Any, like: Node) -> Node:
    """Add a scale of activations in the dtype of the tensors that are not quantized."""
    scale, dtype = lowering.constant(source), fake_tensor(like).dtype
    return lowering.buffer(f"{scale.name}_{dtype}", lambda: scale.load().to(dtype))


def _layer(lowering: AtenLowering, node: Node) -> Node:
    """Lower a linear layer or a convolution with its weight in Core AI's format."""
    x, weight, *rest = node.args
    args = [lowering.value(x), _weight(lowering, weight), *torch.fx.map_arg(rest, lowering.value)]  # type: ignore[arg-type]
    return lowering.graph.call_function(node.target, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]


def _weight(lowering: AtenLowering, source: Any) -> Node:
    weight, base = lowering.weight(source), fake_tensor(source).dtype
    if isinstance(weight, Constant):
        return lowering.value(source)
    if isinstance(weight, PaletteWeight):
        groups, entries = weight.entries
        # The converter knows 4-bit indices by these names.
        indices = lowering.buffer(f"{weight.codes.name}_indices", weight.codes.load)
        lut = lowering.buffer(
            f"{weight.palettes.name}_lut",
            lambda: weight.palettes.load().to(base).reshape(groups, 1, entries, 1),
        )
        return lowering.call(coreai.lut_to_dense.default, indices, lut, 0)
    rows, columns, *kernel = weight.shape
    shape = (rows, columns // weight.group if weight.group else 1, *(1 for _ in kernel))
    codes = lowering.buffer(weight.codes.name, weight.codes.load)
    scale = lowering.buffer(weight.scale.name, lambda: weight.scale.load().to(base).reshape(shape))
    dtype = torch.int4 if weight.bits == 4 else torch.int8  # type: ignore[attr-defined]
    return lowering.call(coreai.constexpr_blockwise_shift_scale.default, codes, scale, None, None, dtype)


TABLE: dict[Any, Lower] = {
    aten.linear.default: _layer,
    aten.conv2d.default: _layer,
    qd.quantize_per_tensor.tensor: _quantize,
    qd.dequantize_per_tensor.tensor: _dequantize,
    qd.dequantize_per_channel.default: _dequantize,
    qd.dequantize_per_channel_group.default: lambda lowering, node: lowering.group_weight(node),
    torch.ops.dsvl.dequantize_palette.default: lambda lowering, node: lowering.palette_weight(node),
}
BOUNDARIES = frozenset(TABLE) - {aten.linear.default, aten.conv2d.default}
