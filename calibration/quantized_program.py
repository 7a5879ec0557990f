"""Quantized programs: components traced with quantize and dequantize operators.

The layers of a component are quantized before it is traced. The traced program then contains
``quantized_decomposed`` operators, and the eager module computes the same. Scales are parameters
(``weight_scale``, ``input_scale``, ``key_scale``, ``value_scale``), so a program does not depend on
their values, and compilers read them like any weight.

FP8 has the operators ``dsvl::quantize_float8`` and ``dsvl::dequantize_float8``, because
``quantized_decomposed.quantize_per_tensor`` rounds to integers before it casts, which is not E4M3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan, layer_kind
from reference.model.config import ModelConfig
from reference.model.decoder import SelfAttention
from reference.model.deepseek_vl import DeepSeekVL
from reference.model.operators import FLOAT8_MAX
from reference.trace import TRACED_COMPONENTS, TracedComponent, trace_component

qd = torch.ops.quantized_decomposed
INT8_RANGE = (-128, 127, torch.int8)
PALETTE_SIZE = 16  # entries
CHUNK_ELEMENTS = 1 << 19  # elements of a weight in one chunk of ``map_row_chunks``
INT4_RANGE = (-8, 7, torch.int8)  # PyTorch has no 4-bit tensors; compilers pack the codes


@torch.library.custom_op("dsvl::quantize_float8", mutates_args=())
def quantize_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize ``x / scale`` to E4M3: round to nearest even, saturate at ±448 (arXiv 2209.05433).

    Args:
        x: ``[...]``.
        scale: a scalar, or ``[out]`` along axis 0.

    Returns:
        ``[...]`` float8.
    """
    scaled = x.float() / _broadcast_channels(scale, x)
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


@quantize_float8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("dsvl::dequantize_float8", mutates_args=())
def dequantize_float8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply float8 codes by their scale; the inverse of ``quantize_float8`` up to rounding."""
    return (codes.float() * _broadcast_channels(scale, codes)).to(dtype)


@dequantize_float8.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


@torch.library.custom_op("dsvl::quantize_palette", mutates_args=())
def quantize_palette(weight: Tensor, palettes: Tensor) -> Tensor:
    """Find the nearest palette entry of each weight.

    Args:
        weight: ``[out, in]``.
        palettes: ``[out / group, 16]``, ascending; one palette per group of consecutive rows.

    Returns:
        Indices ``[out, in]`` uint8.
    """
    entries = palettes.float()
    between = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()
    groups = weight.float().reshape(len(entries), -1).contiguous()
    return torch.searchsorted(between, groups).to(torch.uint8).reshape(weight.shape)


@quantize_palette.register_fake
def _(weight: Tensor, palettes: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.uint8)


@torch.library.custom_op("dsvl::dequantize_palette", mutates_args=())
def dequantize_palette(codes: Tensor, palettes: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up the palette entries of indices that ``quantize_palette`` returned."""
    groups = codes.reshape(len(palettes), -1).long()
    return palettes.gather(1, groups).reshape(codes.shape).to(dtype)


@dequantize_palette.register_fake
def _(codes: Tensor, palettes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _broadcast_channels(scale: Tensor, x: Tensor) -> Tensor:
    return scale.float().reshape(-1, *[1] * (x.dim() - 1)) if scale.dim() else scale.float()


def quantize_weight(weight: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """Quantize a weight.

    Args:
        weight: ``[out, in, ...]``.
        scale: ``[out]``; ``[out, in / group]`` for int4; the palettes ``[out / group, 16]`` for
            palette4.
        precision: the precision of the layer.

    Returns:
        Codes ``[out, in, ...]``: int8 (from -8 to 7 for int4), float8, or uint8 palette indices.
    """
    if precision.kind == "fp8":
        return torch.ops.dsvl.quantize_float8(weight, scale)
    if precision.kind == "palette4":
        return torch.ops.dsvl.quantize_palette(weight, scale)
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    if precision.kind == "int4":
        return qd.quantize_per_channel_group(weight, scale.float(), zeros, *INT4_RANGE, precision.group)
    return qd.quantize_per_channel(weight, scale.float(), zeros, 0, *INT8_RANGE)


def dequantize_weight(codes: Tensor, scale: Tensor, precision: LayerPrecision, dtype: torch.dtype) -> Tensor:
    """Dequantize codes that ``quantize_weight`` returned, to ``dtype``."""
    if precision.kind == "fp8":
        return torch.ops.dsvl.dequantize_float8(codes, scale, dtype)
    if precision.kind == "palette4":
        return torch.ops.dsvl.dequantize_palette(codes, scale, dtype)
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    if precision.kind == "int4":
        return qd.dequantize_per_channel_group(
            codes, scale.float(), zeros, *INT4_RANGE, precision.group, dtype
        )
    return qd.dequantize_per_channel(codes, scale.float(), zeros, 0, *INT8_RANGE, out_dtype=dtype)


def fake_quantize_weight(weight: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """Quantize and dequantize a weight; arguments as in ``quantize_weight``."""
    return dequantize_weight(quantize_weight(weight, scale, precision), scale, precision, weight.dtype)


def map_row_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to chunks of rows of a weight and other tensors, and join the results.

    Temporary tensors then fit in the processor's cache: 4-bit scales take a sixth of the time,
    ``fake_quantize_weight`` a fourth, and memory is that of the weight and the result.

    Args:
        function: takes a chunk of each tensor.
        tensors: the weight ``[out, ...]``, then tensors with a row per output channel.
    """
    weight = tensors[0]
    rows = max(CHUNK_ELEMENTS * len(weight) // weight.numel(), 1)
    chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def fake_quantize(x: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """Quantize and dequantize activations; ``scale`` is a scalar."""
    if precision.kind == "fp8":
        codes = torch.ops.dsvl.quantize_float8(x, scale)
        return torch.ops.dsvl.dequantize_float8(codes, scale, x.dtype)
    zero = torch.zeros((), dtype=torch.int64)
    codes = qd.quantize_per_tensor.tensor(x, scale.float(), zero, *INT8_RANGE)
    return qd.dequantize_per_tensor.tensor(codes, scale.float(), zero, *INT8_RANGE, out_dtype=x.dtype)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Quantize and dequantize activations ``[..., C]`` in 8 bits per token (torchao's 8da)."""
    scale, zero = qd.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = qd.quantize_per_token(x, scale, zero, *INT8_RANGE)
    return qd.dequantize_per_token(codes, scale, zero, *INT8_RANGE, x.dtype)


class _QuantizedLayer(nn.Module):
    """Base of quantized linear layers and convolutions.

    ``in_chunks`` fake-quantizes the weight in chunks of rows, which a traced program must not do.
    """

    weight: Any
    in_chunks = False

    def quantize(self, precision: LayerPrecision) -> None:
        """Add the scale parameters of a precision."""
        rows, columns = self.weight.shape[:2]
        shape: tuple[int, ...] = (rows,)
        if precision.kind == "int4":
            shape = (rows, columns // precision.group)
        elif precision.kind == "palette4":
            shape = (rows // precision.group, PALETTE_SIZE)
        dtype = self.weight.dtype
        self.precision = precision
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=dtype))
        if precision.quantizes_activations:
            self.input_scale = nn.Parameter(torch.ones((), dtype=dtype))

    def quantized_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the weight, fake-quantized."""
        if self.precision.quantizes_activations:
            x = fake_quantize(x, self.input_scale, self.precision)
        if self.precision.dynamic:
            x = fake_quantize_per_token(x)
        fake_quantize_rows = partial(fake_quantize_weight, precision=self.precision)
        if self.in_chunks and self.precision.kind != "palette4":  # rows share a palette
            return x, map_row_chunks(fake_quantize_rows, self.weight, self.weight_scale)
        return x, fake_quantize_rows(self.weight, self.weight_scale)


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """A linear layer with fake-quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(*self.quantized_operands(x), self.bias)


class QuantizedConv2d(_QuantizedLayer, nn.Conv2d):
    """A convolution with fake-quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, H', W']``."""
        return self._conv_forward(*self.quantized_operands(x), self.bias)


def quantize_layers(module: nn.Module, component: str, plan: PrecisionPlan) -> None:
    """Quantize the layers of a component, and the decoder's cache, in place, as a plan says."""
    for path, layer in list(module.named_modules()):
        kind = layer_kind(layer)
        if kind is None:
            continue
        precision = plan.precision_of(LayerSpec(f"{component}.{path}", kind, tuple(layer.weight.shape)))
        if precision.kind != "float":
            quantize_layer(layer, precision)
    if component == "decoder" and plan.kv_cache != "float":
        for attention in module.modules():
            if isinstance(attention, SelfAttention):
                attention.quantize_cache()


def quantize_layer(layer: Any, precision: LayerPrecision) -> None:
    """Make a linear layer or convolution a quantized one, in place; it keeps its parameters."""
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    with torch.device(layer.weight.device):
        layer.quantize(precision)


def quantize_model(model: DeepSeekVL, plan: PrecisionPlan) -> None:
    """Quantize every component of a model that is run, not traced."""
    for component in TRACED_COMPONENTS:
        quantize_layers(getattr(model, component), component, plan)
    for module in model.modules():
        if isinstance(module, _QuantizedLayer):
            module.in_chunks = True


@lru_cache(maxsize=32)
def trace_with_plan(config: ModelConfig, component: str, plan: PrecisionPlan) -> TracedComponent:
    """Trace a component in a plan's base precision, with the plan's layers quantized.

    The last programs are cached: tracing takes seconds, a program has no weights, and compilers do
    not change it.
    """
    prepare = partial(quantize_layers, component=component, plan=plan)
    return trace_component(config, component, plan.base, plan.kv_cache, prepare)
