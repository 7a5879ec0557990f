"""The parameters of a quantized program, one at a time: folded weights, and the scales of all tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from calibration.folding import Folding, foldings
from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan, component_layers
from calibration.quantized_program import PALETTE, by_rows, round_trip
from calibration.scale_table import QUANTIZED_MAX, ScaleTable
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS
from runtimes.errors import UserError

LoadParameter = Callable[[str], Tensor]
INT4_MAX = 7.0
PALETTE_ROUNDS = 40  # of k-means; the error no longer moves then
SCALES = ("weight_scale", "input_scale", "key_scale", "value_scale")
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class QuantizedWeights:
    """Parameters of a checkpoint under a precision plan.

    Args:
        table: its scales; None where the plan needs none.

    Raises:
        UserError: the plan does not fit the model, or the table is of another checkpoint.
    """

    def __init__(self, source: Checkpoint, plan: PrecisionPlan, table: ScaleTable | None = None) -> None:
        plan.check(source.config)
        if table and table.checkpoint != source.digest:
            raise UserError(
                f"The scale table was made for the checkpoint {table.checkpoint[:12]}, this is"
                f" {source.digest[:12]}; calibrate {source.folder}."
            )
        if table is None and plan.needs_scales(source.config):
            raise UserError(f"The precision {plan.name} needs a scale table; give one made by 'calibrate'.")
        self.source, self.plan, self.table = source, plan, table
        self._layers: dict[str, LayerSpec] = {
            layer.name: layer
            for component in TRACED_COMPONENTS
            for layer in component_layers(source.config, component)
        }
        self._folded = FoldedWeights(source, table.smoothing if table else {})
        self._weight_scale = cache(self._find_weight_scale)  # sought once for all that is made of a weight

    def check(self) -> None:
        """Raise UserError where the table lacks a scale that the plan needs."""
        if self.table is None:
            return
        for name, layer in self._layers.items():
            precision = self.plan.of(layer)
            if precision.quantizes_activations:
                self.table.activation(name, precision.kind)
        if self.plan.kv_cache != "float":
            for index in range(self.source.config.decoder.layers):
                for state in ("key", "value"):
                    self.table.cache(f"decoder.layers.{index}.self_attn", state, self.plan.kv_cache)

    def load(self, parameter: str) -> Tensor:
        """A parameter by its name in the quantized model.

        Weights come as fp32 numbers that their codes stand for exactly where they are tuned; scales are fp32,
        and normal numbers of the plan's base.
        """
        owner, _, kind = parameter.rpartition(".")
        if kind in SCALES:
            scale = self._scale(owner, kind)
            if kind == "weight_scale" and self.plan.of(self._layers[owner]).kind == "palette4":
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
            return torch.tensor(self._table.activation(owner, self.plan.of(self._layers[owner]).kind))
        return torch.from_numpy(self._table.cache(owner, kind.removesuffix("_scale"), self.plan.kv_cache))

    @property
    def _table(self) -> ScaleTable:
        assert self.table  # the plan needs scales, else nobody asks
        return self.table

    def _tuned(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Weight and scale of a layer that was tuned for the very precision that the plan gives it."""
        precision = self.plan.of(self._layers[layer])
        known = self.table.tuned.get(layer) if self.table else None
        if known is None or known.precision != str(precision):
            return None
        codes, scale = torch.from_numpy(known.codes), torch.from_numpy(known.scale)
        return spread(scale, precision, codes) * codes, scale

    def _find_weight_scale(self, layer: str) -> Tensor:
        tuned = self._tuned(layer)
        if tuned is not None:
            return tuned[1]
        weight = self._folded.load(f"{layer}.weight")
        return find_weight_scale(weight, self.plan.of(self._layers[layer]), layer)


class FoldedWeights:
    """A checkpoint's parameters with smoothing factors folded in; exact but for rounding.

    Args:
        factors: producer → factors ``[C]``; see ``calibration.folding``.
    """

    def __init__(self, source: Checkpoint, factors: Mapping[str, np.ndarray]) -> None:
        self._source = source
        self._produced: dict[str, tuple[Folding, Tensor]] = {}
        self._consumed: dict[str, Tensor] = {}
        for folding in foldings(source.config):
            if folding.producer in factors:
                vector = torch.from_numpy(factors[folding.producer])
                self._produced[folding.producer] = (folding, vector)
                self._consumed |= dict.fromkeys(folding.consumers, vector)
        unknown = factors.keys() - self._produced.keys()
        if unknown:
            raise UserError(
                f"The scale table smooths {', '.join(sorted(unknown))}, which this model does not have."
            )

    def load(self, parameter: str) -> Tensor:
        owner, _, kind = parameter.rpartition(".")
        value = self._source.load(parameter)
        if owner in self._consumed and kind == "weight":
            value = value.float() * self._consumed[owner]
        if owner in self._produced:
            folding, factors = self._produced[owner]
            rows = torch.ones(len(value))
            rows[folding.first : folding.first + len(factors)] = factors
            value = value.float() / rows.reshape(-1, *[1] * (value.dim() - 1))
        return value


def find_weight_scale(weight: Tensor, precision: LayerPrecision, layer: str = "a layer") -> Tensor:
    """Scale of a weight ``[out, in, ...]`` in fp32: ``[out]``, or ``[out, in / group]`` for int4.

    8-bit scales cover the largest magnitude. 4-bit scales clip it where that lowers the mean squared error.
    Of a palette it is the entries, ``[out / group, 16]``.

    Raises:
        UserError: the weight holds NaN or infinity.
    """
    if not all(torch.isfinite(extreme) for extreme in weight.aminmax()):
        raise UserError(f"The weight of {layer} holds NaN or infinity; are the checkpoint's weights sound?")
    if precision.kind == "palette4":
        return find_palettes(weight, precision.group)
    find = _clipped_scale if precision.kind == "int4" else _covering_scale
    return by_rows(lambda rows: find(rows.float(), precision), weight)


def _covering_scale(weight: Tensor, precision: LayerPrecision) -> Tensor:
    """Scales ``[out]`` that cover the largest magnitude."""
    return _largest(weight.flatten(1)) / QUANTIZED_MAX["fp8" if precision.kind == "fp8" else "int8"]


def _largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each ``[..., numbers]``; of zeros 1, as any scale gives them the codes 0."""
    amax = groups.abs().amax(dim=-1)
    return torch.where(amax > 0, amax, torch.ones_like(amax))


def _clipped_scale(weight: Tensor, precision: LayerPrecision) -> Tensor:
    """Scales ``[out, in / group]`` that clip the largest magnitude where that lowers the error."""
    groups = weight.unflatten(1, (-1, precision.group))
    amax = _largest(groups)  # [out, in / group]
    best = torch.full_like(amax, torch.inf)
    scale = amax / INT4_MAX
    for clip in CLIPS:
        candidate = amax * clip / INT4_MAX
        error = round_trip(weight, candidate, precision).sub_(weight).square_()
        error = error.reshape(groups.shape).sum(dim=-1)
        scale, best = torch.where(error < best, candidate, scale), torch.minimum(error, best)
    return scale


def find_palettes(weight: Tensor, rows: int) -> Tensor:
    """The 16 numbers that stand best for each group of rows, ascending, ``[out / rows, 16]`` fp32.

    k-means on a line (Lloyd 1982): sorted once, a cluster is a stretch, and its mean a difference of sums.

    Args:
        weight: ``[out, in]``; rows: consecutive output channels of a group.
    """
    values = weight.float().reshape(len(weight) // rows, -1).sort(dim=1).values
    count = values.shape[1]
    sums = torch.nn.functional.pad(values.double().cumsum(dim=1), (1, 0))
    middles = (torch.arange(PALETTE) * 2 + 1) * count // (2 * PALETTE)
    # Starting half way between quantiles and equal steps, so that the tails get entries too.
    steps = torch.linspace(0, 1, PALETTE)
    low, high = values[:, :1], values[:, -1:]
    entries = (values[:, middles] + low + (high - low) * steps) / 2
    for _ in range(PALETTE_ROUNDS):
        between = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()
        ends = torch.searchsorted(values, between)  # [groups, 15]
        ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=count)
        sizes = ends.diff(dim=1)
        totals = sums.gather(1, ends).diff(dim=1)
        means = (totals / sizes.clamp(min=1)).float()
        entries = torch.where(sizes > 0, means, entries).sort(dim=1).values
    return entries


def spread(scale: Tensor, precision: LayerPrecision, codes: Tensor) -> Tensor:
    """A weight's scale broadcast to the shape of its codes."""
    if precision.kind == "int4":
        return scale.repeat_interleave(precision.group, dim=1)
    return scale.reshape(-1, *[1] * (codes.dim() - 1))
