"""Quantized programs: layers with quantize/dequantize operators, put into a component before it is traced.

The traced program then holds ``quantized_decomposed`` operators, and the eager module computes what the
program says. Scales are parameters (``weight_scale``, ``input_scale``, ``key_scale``, ``value_scale``),
so a program does not depend on their values, and compilers stream them like any weight.

FP8 has operators of its own, ``dsvl::quantize_float8`` and ``dsvl::dequantize_float8``:
``quantized_decomposed.quantize_per_tensor`` rounds to whole numbers before it casts, which is not E4M3.
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
INT8 = (-128, 127, torch.int8)
PALETTE = 16  # entries
AT_ONCE = 1 << 19  # numbers of a weight that are worked on at a time
INT4 = (-8, 7, torch.int8)  # PyTorch has no 4-bit tensors; compilers pack the codes


@torch.library.custom_op("dsvl::quantize_float8", mutates_args=())
def quantize_float8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, rounded to nearest even and saturated at ±448 (arXiv 2209.05433).

    Args:
        scale: one value, or one per output channel along axis 0.
    """
    scaled = x.float() / _along_channels(scale, x)
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


@quantize_float8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("dsvl::dequantize_float8", mutates_args=())
def dequantize_float8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantize_float8`` but for its rounding."""
    return (codes.float() * _along_channels(scale, codes)).to(dtype)


@dequantize_float8.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


@torch.library.custom_op("dsvl::quantize_palette", mutates_args=())
def quantize_palette(weight: Tensor, palettes: Tensor) -> Tensor:
    """Index of the nearest palette entry, uint8 ``[out, in]``.

    Args:
        weight: ``[out, in]``.
        palettes: ``[out / group, 16]``, ascending; one for each group of consecutive rows.
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
    """The palette entries that ``quantize_palette`` chose."""
    groups = codes.reshape(len(palettes), -1).long()
    return palettes.gather(1, groups).reshape(codes.shape).to(dtype)


@dequantize_palette.register_fake
def _(codes: Tensor, palettes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _along_channels(scale: Tensor, x: Tensor) -> Tensor:
    return scale.float().reshape(-1, *[1] * (x.dim() - 1)) if scale.dim() else scale.float()


def quantize_weight(weight: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """Codes of a weight ``[out, in, ...]``: int8 (int4's lie in -8..7), float8, or uint8 indices.

    Args:
        scale: ``[out]``, ``[out, in / group]`` for int4, or the palettes ``[out / group, 16]``.
    """
    if precision.kind == "fp8":
        return torch.ops.dsvl.quantize_float8(weight, scale)
    if precision.kind == "palette4":
        return torch.ops.dsvl.quantize_palette(weight, scale)
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    if precision.kind == "int4":
        return qd.quantize_per_channel_group(weight, scale.float(), zeros, *INT4, precision.group)
    return qd.quantize_per_channel(weight, scale.float(), zeros, 0, *INT8)


def dequantize_weight(codes: Tensor, scale: Tensor, precision: LayerPrecision, dtype: torch.dtype) -> Tensor:
    """The weight that a layer computes with, from its codes."""
    if precision.kind == "fp8":
        return torch.ops.dsvl.dequantize_float8(codes, scale, dtype)
    if precision.kind == "palette4":
        return torch.ops.dsvl.dequantize_palette(codes, scale, dtype)
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    if precision.kind == "int4":
        return qd.dequantize_per_channel_group(codes, scale.float(), zeros, *INT4, precision.group, dtype)
    return qd.dequantize_per_channel(codes, scale.float(), zeros, 0, *INT8, out_dtype=dtype)


def round_trip(weight: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """A weight as the precision keeps it, in its own dtype."""
    return dequantize_weight(quantize_weight(weight, scale, precision), scale, precision, weight.dtype)


def by_rows(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``work`` on a weight ``[out, ...]`` and what else has a row for each output channel, in parts.

    What it makes on the way then stays in a processor's cache: 4-bit scales take a sixth of the time, a
    ``round_trip`` a fourth, and memory is that of the weight and the result.
    """
    weight = tensors[0]
    rows = max(AT_ONCE * len(weight) // weight.numel(), 1)
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([work(*part) for part in parts])


def fake_quantize(x: Tensor, scale: Tensor, precision: LayerPrecision) -> Tensor:
    """Activations as the precision keeps them, in their own dtype; ``scale`` is one value."""
    if precision.kind == "fp8":
        codes = torch.ops.dsvl.quantize_float8(x, scale)
        return torch.ops.dsvl.dequantize_float8(codes, scale, x.dtype)
    zero = torch.zeros((), dtype=torch.int64)
    codes = qd.quantize_per_tensor.tensor(x, scale.float(), zero, *INT8)
    return qd.dequantize_per_tensor.tensor(codes, scale.float(), zero, *INT8, out_dtype=x.dtype)


def quantize_tokens(x: Tensor) -> Tensor:
    """Activations ``[..., C]`` through 8 bits, each token by its own range (torchao's 8da)."""
    scale, zero = qd.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = qd.quantize_per_token(x, scale, zero, *INT8)
    return qd.dequantize_per_token(codes, scale, zero, *INT8, x.dtype)


class _Quantized(nn.Module):
    """What quantized linear layers and convolutions share.

    ``in_parts`` computes the weight some rows at a time, which a traced program must not.
    """

    weight: Any
    in_parts = False

    def quantize(self, precision: LayerPrecision) -> None:
        rows, columns = self.weight.shape[:2]
        shape: tuple[int, ...] = (rows,)
        if precision.kind == "int4":
            shape = (rows, columns // precision.group)
        elif precision.kind == "palette4":
            shape = (rows // precision.group, PALETTE)
        dtype = self.weight.dtype
        self.precision = precision
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=dtype))
        if precision.quantizes_activations:
            self.input_scale = nn.Parameter(torch.ones((), dtype=dtype))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight as the precision keeps them."""
        if self.precision.quantizes_activations:
            x = fake_quantize(x, self.input_scale, self.precision)
        if self.precision.dynamic:
            x = quantize_tokens(x)
        keep = partial(round_trip, precision=self.precision)
        if self.in_parts and self.precision.kind != "palette4":  # a palette is of several rows
            return x, by_rows(keep, self.weight, self.weight_scale)
        return x, keep(self.weight, self.weight_scale)


class QuantizedLinear(_Quantized, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self.operands(x), self.bias)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(*self.operands(x), self.bias)


def quantize_layers(module: nn.Module, component: str, plan: PrecisionPlan) -> None:
    """Turn the layers of a component into quantized ones, in place, and its cache where the plan says so."""
    for path, layer in list(module.named_modules()):
        kind = layer_kind(layer)
        if kind is None:
            continue
        precision = plan.of(LayerSpec(f"{component}.{path}", kind, tuple(layer.weight.shape)))
        if precision.kind != "float":
            quantize_layer(layer, precision)
    if component == "decoder" and plan.kv_cache != "float":
        for attention in module.modules():
            if isinstance(attention, SelfAttention):
                attention.quantize_cache()


def quantize_layer(layer: Any, precision: LayerPrecision) -> None:
    """Change one linear layer or convolution into its quantized form, keeping its parameters."""
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    with torch.device(layer.weight.device):
        layer.quantize(precision)


def quantize_model(model: DeepSeekVL, plan: PrecisionPlan) -> None:
    """``quantize_layers`` for every component of a model that is run, not traced."""
    for component in TRACED_COMPONENTS:
        quantize_layers(getattr(model, component), component, plan)
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.in_parts = True


@lru_cache(maxsize=32)
def trace_planned(config: ModelConfig, component: str, plan: PrecisionPlan) -> TracedComponent:
    """A component traced in a plan's base, with the plan's layers quantized.

    The last ones are kept: tracing takes seconds, holds no weights, and whoever lowers a program leaves it as
    it is.
    """
    prepare = partial(quantize_layers, component=component, plan=plan)
    return trace_component(config, component, plan.base, plan.kv_cache, prepare)
