"""Choice of scales: builds the scale table from calibration statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from calibration.folding import list_foldings
from calibration.gptq import apply_gptq
from calibration.observers import TensorStatistics
from calibration.precision_plan import LayerSpec, PrecisionPlan, component_layers
from calibration.quantized_weights import FoldedWeights
from calibration.ranges import PERCENTILE, find_amax
from calibration.scale_table import QUANTIZED_MAX, ActivationScale, ScaleTable
from calibration.smoothing import find_smoothing
from calibration.statistics import Statistics, observed_layers
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.errors import UserError

OnStep = Callable[[str, int, int], None]


def build_scale_table(
    source: Checkpoint,
    statistics: Statistics,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    tune_for: PrecisionPlan | None = None,
    smooth: bool = True,
    gptq: bool = True,
    on_step: OnStep = lambda name, done, total: None,
) -> ScaleTable:
    """Choose the scales of all activations and caches, and tune for a precision plan.

    Args:
        source: the checkpoint.
        statistics: collected with the checkpoint.
        method: how INT8 ranges are found, one of ``ranges.METHODS``; FP8 always covers the largest
            value.
        percentile: for that method.
        tune_for: the plan for which smoothing and GPTQ are done; None skips both. The table also
            serves other plans: smoothing is exact, and tuned codes are used only in the precision
            that they were made for.
        smooth: whether to smooth.
        gptq: whether to use GPTQ for 4-bit weights.
        on_step: called with the name of the step, the number of items done and in total.

    Raises:
        UserError: the statistics belong to another checkpoint, miss a tensor, or have a tensor that
            is always zero.
    """
    if statistics.checkpoint != source.digest:
        raise UserError(f"The statistics belong to another checkpoint; calibrate {source.folder}.")
    if not statistics.samples:
        raise UserError("The statistics hold no samples; calibrate with at least one.")
    layers: dict[str, LayerSpec] = {
        layer.name: layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)
    }
    table = ScaleTable(source.digest, statistics.data_digest, len(statistics.samples))
    if tune_for and not statistics.keep:
        raise UserError(
            "The statistics hold no rows of activations, which tuning needs; calibrate again with --rows"
            " above 0."
        )
    if tune_for and smooth:
        tune_for.check(source.config)
        table.smoothing = find_smoothing(
            source, tune_for, layers, statistics, method, percentile, partial(on_step, "smoothing")
        )
    inputs = _InputStatistics(source, statistics, table.smoothing)
    for index, layer in enumerate(layers):
        on_step("ranges", index, len(layers))
        table.activations[layer] = _activation_scale(
            layer, inputs.for_layer(layer), len(statistics.samples), method, percentile
        )
    table.caches = _cache_magnitudes(source, statistics, table.smoothing)
    if tune_for:
        table.tuned_for = tune_for.name
        if gptq:
            weights = FoldedWeights(source, table.smoothing)
            table.tuned = apply_gptq(tune_for, layers, weights, inputs.for_layer, partial(on_step, "GPTQ"))
    return table


class _InputStatistics:
    """Statistics of layers' inputs divided by the smoothing factors; caches the last result."""

    def __init__(self, source: Checkpoint, statistics: Statistics, smoothing: dict[str, np.ndarray]) -> None:
        self._statistics, self._observed = statistics, observed_layers(source.config)
        self._factors = {
            name: smoothing[folding.producer]
            for folding in list_foldings(source.config)
            if folding.producer in smoothing
            for name in folding.consumers
        }
        self._last: tuple[str, TensorStatistics] | None = None

    def for_layer(self, layer: str) -> TensorStatistics:
        name = self._observed[layer]
        if name not in self._statistics.tensors:
            raise UserError(f"The statistics have no entry for the input of {layer}; calibrate again.")
        if self._last is None or self._last[0] != name:
            observed = self._statistics.tensors[name]
            factors = self._factors.get(layer)
            self._last = (name, observed if factors is None else observed.divided(factors))
        return self._last[1]


def _activation_scale(
    layer: str, observed: TensorStatistics, samples: int, method: str, percentile: float
) -> ActivationScale:
    amax = find_amax(observed, method, percentile)
    if not amax > 0:
        raise UserError(
            f"The input of {layer} is zero for all calibration data, so it has no scale; use other data."
        )
    return ActivationScale(
        int8=amax / QUANTIZED_MAX["int8"],
        fp8=observed.amax / QUANTIZED_MAX["fp8"],
        method=method if method != "percentile" else f"percentile {percentile:g}",
        range=(observed.minimum, observed.maximum),
        samples=samples,
        histogram=observed.digest,
    )


def _cache_magnitudes(
    source: Checkpoint, statistics: Statistics, smoothing: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the largest magnitudes of keys (after RoPE) and values, ``[Hkv]`` per layer."""
    decoder = source.config.decoder
    caches: dict[str, dict[str, np.ndarray]] = {}
    for layer in range(decoder.layers):
        attention = f"decoder.layers.{layer}.self_attn"
        caches[attention] = {}
        for state in ("key", "value"):
            name = f"{attention}/{state}"
            if name not in statistics.tensors:
                raise UserError(
                    f"The statistics have no entry for the {state} cache of {attention}; calibrate again."
                )
            largest = statistics.tensors[name].channel_max
            if state == "value" and f"{attention}.v_proj" in smoothing:
                largest = largest / smoothing[f"{attention}.v_proj"]
            heads = largest.reshape(decoder.kv_heads, decoder.head_dim).max(axis=1)
            # The codes of a head that is always zero are 0 with any scale.
            caches[attention][state] = np.where(heads > 0, heads, 1).astype(np.float32)
    return caches
