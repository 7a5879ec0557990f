"""Parameters of a quantized program, loaded one at a time: folded weights and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from calibration.folding import Folding, list_foldings
from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan, component_layers
from calibration.quantized_program import PALETTE_SIZE, fake_quantize_weight, map_row_chunks
from calibration.scale_table import QUANTIZED_MAX, ScaleTable
from reference.checkpoint.checkpoint import Checkpoint
from reference.model.config import ModelConfig
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS
from runtimes.errors import UserError

LoadParameter = Callable[[str], Tensor]
INT4_MAX = 7.0
KMEANS_ITERATIONS = 40  # more do not lower the error
SCALE_PARAMETERS = ("weight_scale", "input_scale", "key_scale", "value_scale")
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class QuantizedWeights:
    """Parameters of a checkpoint under a precision plan."""

    def __init__(self, source: Checkpoint, plan: PrecisionPlan, table: ScaleTable | None = None) -> None:
        """Check the plan and the scales against the checkpoint.

        Args:
            source: the checkpoint.
            plan: precision of each layer.
            table: calibrated scales; None if the plan needs none.

        Raises:
            UserError: the plan does not match the model, needs scales, or the table belongs to
                another checkpoint.
        """
        plan.check(source.config)
        if table and table.checkpoint != source.digest:
            raise UserError(
                f"The scale table was made for the checkpoint {table.checkpoint[:12]}, but"
                f" {source.folder} is {source.digest[:12]}; calibrate {source.folder}."
            )
        if table is None and plan.needs_scales(source.config):
            raise UserError(
                f"The precision {plan.name} needs a scale table; make one with 'dsvl-export calibrate'."
            )
        self.source, self.plan, self.table = source, plan, table
        self._layers: dict[str, LayerSpec] = {
            layer.name: layer
            for component in TRACED_COMPONENTS
            for layer in component_layers(source.config, component)
        }
        self._folded = FoldedWeights(source, table.smoothing if table else {})
        self._weight_scale = cache(self._find_weight_scale)

    def check(self) -> None:
        """Check that the table has every scale that the plan needs.

        Raises:
            UserError: a scale is missing.
        """
        if self.table is None:
            return
        for name, layer in self._layers.items():
            precision = self.plan.precision_of(layer)
            if precision.quantizes_activations:
                self.table.activation_scale(name, precision.kind)
        if self.plan.kv_cache != "float":
            for index in range(self.source.config.decoder.layers):
                for state in ("key", "value"):
                    self.table.cache_scales(f"decoder.layers.{index}.self_attn", state, self.plan.kv_cache)

    def load(self, parameter: str) -> Tensor:
        """Load a parameter by its name in the quantized model.

        A tuned weight is fp32 and equals its dequantized codes exactly. Scales are fp32, and normal
        numbers (not subnormal) of the plan's base.
        """
        owner, _, kind = parameter.rpartition(".")
        if kind in SCALE_PARAMETERS:
            scale = self._scale(owner, kind)
            if kind == "weight_scale" and self.plan.precision_of(self._layers[owner]).kind == "palette4":
                return scale
            return scale.clamp(min=torch.finfo(PRECISION_DTYPES[self.plan.base]).tiny)
        if kind == "weight" and owner in self._layers:
            tuned = self._tuned(owner)
            return self._folded.load(parameter) if tuned is None else tuned[0]
        return self._folded.load(parameter)

    def _scale(self, owner: str, kind: str) -> Tensor:
        if kind == "weight_scale":
            return self._weight_scale(owner)
        if kind == "input_scale":
            return torch.tensor(
                self._table.activation_scale(owner, self.plan.precision_of(self._layers[owner]).kind)
            )
        return torch.from_numpy(
            self._table.cache_scales(owner, kind.removesuffix("_scale"), self.plan.kv_cache)
        )

    @property
    def _table(self) -> ScaleTable:
        assert self.table  # ``__init__`` checked that a plan that needs scales has a table
        return self.table

    def _tuned(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Return weight and scale of a layer if it was tuned for the precision of the plan."""
        precision = self.plan.precision_of(self._layers[layer])
        tuned = self.table.tuned.get(layer) if self.table else None
        if tuned is None or tuned.precision != str(precision):
            return None
        codes, scale = torch.from_numpy(tuned.codes), torch.from_numpy(tuned.scale)
        return broadcast_scale(scale, precision, codes) * codes, scale

    def _find_weight_scale(self, layer: str) -> Tensor:
        tuned = self._tuned(layer)
        if tuned is not None:
            return tuned[1]
        weight = self._folded.load(f"{layer}.weight")
        return find_weight_scale(weight, self.plan.precision_of(self._layers[layer]), layer)


class FoldedFactors:
    """Smoothing factors by the layers whose weights they are folded into."""

    def __init__(self, config: ModelConfig, factors: Mapping[str, np.ndarray]) -> None:
        """Assign the factors to weights.

        Args:
            config: of the model.
            factors: producer → factors ``[C]``; see ``calibration.folding``.

        Raises:
            UserError: the model has no such producer.
        """
        self._produced: dict[str, tuple[Folding, Tensor]] = {}
        self._consumed: dict[str, Tensor] = {}
        for folding in list_foldings(config):
            if folding.producer in factors:
                vector = torch.from_numpy(factors[folding.producer])
                self._produced[folding.producer] = (folding, vector)
                self._consumed |= dict.fromkeys(folding.consumers, vector)
        unknown = factors.keys() - self._produced.keys()
        if unknown:
            raise UserError(
                f"The scale table has smoothing factors of {', '.join(sorted(unknown))}, which this model"
                " does not have; calibrate again."
            )

    def fold_inputs(self, layer: str, weight: Tensor) -> Tensor:
        """Multiply the input channels ``[..., in]`` of a layer's weight; the result is fp32."""
        return weight.float() * self._consumed[layer] if layer in self._consumed else weight

    def fold_outputs(self, layer: str, value: Tensor) -> Tensor:
        """Divide the output channels ``[out, ...]`` of a layer's parameter; the result is fp32."""
        if layer not in self._produced:
            return value
        folding, factors = self._produced[layer]
        rows = torch.ones(len(value))
        rows[folding.first : folding.first + len(factors)] = factors
        return value.float() / rows.reshape(-1, *[1] * (value.dim() - 1))


class FoldedWeights:
    """A checkpoint's parameters with smoothing factors folded in; exact up to rounding."""

    def __init__(self, source: Checkpoint, factors: Mapping[str, np.ndarray]) -> None:
        """Assign the factors to weights; see ``FoldedFactors``."""
        self._source, self._factors = source, FoldedFactors(source.config, factors)

    def load(self, parameter: str) -> Tensor:
        """Load a parameter as ``Checkpoint.load`` does; folded parameters are fp32."""
        owner, _, kind = parameter.rpartition(".")
        value = self._source.load(parameter)
        if kind == "weight":
            value = self._factors.fold_inputs(owner, value)
        return self._factors.fold_outputs(owner, value)


def find_weight_scale(weight: Tensor, precision: LayerPrecision, layer: str = "a layer") -> Tensor:
    """Find the scale of a weight.

    8-bit scales cover the largest magnitude. 4-bit scales clip it if that lowers the mean squared
    error.

    Args:
        weight: ``[out, in, ...]``.
        precision: the precision of the layer.
        layer: its name, for error messages.

    Returns:
        fp32 ``[out]``; ``[out, in / group]`` for int4; the palettes ``[out / group, 16]`` for
        palette4.

    Raises:
        UserError: the weight holds NaN or infinity.
    """
    if not all(torch.isfinite(extreme) for extreme in weight.aminmax()):
        raise UserError(f"The weight of {layer} holds NaN or infinity; check the weights of the checkpoint.")
    if precision.kind == "palette4":
        return find_palettes(weight, precision.group)
    find = _clipped_scale if precision.kind == "int4" else _max_scale
    return map_row_chunks(lambda rows: find(rows.float(), precision), weight)


def _max_scale(weight: Tensor, precision: LayerPrecision) -> Tensor:
    """Return scales ``[out]`` that cover the largest magnitude."""
    return _amax(weight.flatten(1)) / QUANTIZED_MAX["fp8" if precision.kind == "fp8" else "int8"]


def _amax(groups: Tensor) -> Tensor:
    """Return the largest magnitude along the last axis, but 1 for zeros, which any scale covers."""
    amax = groups.abs().amax(dim=-1)
    return torch.where(amax > 0, amax, torch.ones_like(amax))


def _clipped_scale(weight: Tensor, precision: LayerPrecision) -> Tensor:
    """Return scales ``[out, in / group]``, clipping the largest magnitude to lower the error."""
    groups = weight.unflatten(1, (-1, precision.group))
    amax = _amax(groups)  # [out, in / group]
    best = torch.full_like(amax, torch.inf)
    scale = amax / INT4_MAX
    for clip in CLIP_RATIOS:
        candidate = amax * clip / INT4_MAX
        error = fake_quantize_weight(weight, candidate, precision).sub_(weight).square_()
        error = error.reshape(groups.shape).sum(dim=-1)
        scale, best = torch.where(error < best, candidate, scale), torch.minimum(error, best)
    return scale


def find_palettes(weight: Tensor, rows: int) -> Tensor:
    """Find the palette of each group of rows by k-means in one dimension (Lloyd 1982).

    In sorted values a cluster is a range, so cumulative sums give its mean.

    Args:
        weight: ``[out, in]``.
        rows: consecutive output channels per group.

    Returns:
        Palettes ``[out / rows, 16]`` fp32, ascending.
    """
    values = weight.float().reshape(len(weight) // rows, -1).sort(dim=1).values
    count = values.shape[1]
    sums = torch.nn.functional.pad(values.double().cumsum(dim=1), (1, 0))
    middles = (torch.arange(PALETTE_SIZE) * 2 + 1) * count // (2 * PALETTE_SIZE)
    # Start half way between quantiles and equal steps, so that the tails get entries too.
    steps = torch.linspace(0, 1, PALETTE_SIZE)
    low, high = values[:, :1], values[:, -1:]
    entries = (values[:, middles] + low + (high - low) * steps) / 2
    for _ in range(KMEANS_ITERATIONS):
        between = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()
        ends = torch.searchsorted(values, between)  # [groups, 15]
        ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=count)
        sizes = ends.diff(dim=1)
        totals = sums.gather(1, ends).diff(dim=1)
        means = (totals / sizes.clamp(min=1)).float()
        entries = torch.where(sizes > 0, means, entries).sort(dim=1).values
    return entries


def broadcast_scale(scale: Tensor, precision: LayerPrecision, codes: Tensor) -> Tensor:
    """Broadcast a weight's scale to the shape of its codes."""
    if precision.kind == "int4":
        return scale.repeat_interleave(precision.group, dim=1)
    return scale.reshape(-1, *[1] * (codes.dim() - 1))
