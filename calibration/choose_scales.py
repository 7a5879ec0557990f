"""From statistics to the scale table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from calibration.folding import foldings
from calibration.observers import TensorStatistics
from calibration.precision_plan import LayerSpec, PrecisionPlan, component_layers
from calibration.quantized_weights import FoldedWeights
from calibration.ranges import PERCENTILE, find_amax
from calibration.scale_table import QUANTIZED_MAX, ActivationScale, ScaleTable
from calibration.statistics import Statistics, observed_as
from calibration.tuning import find_smoothing, tune_weights
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.errors import UserError

OnStep = Callable[[str, int, int], None]


def make_table(
    source: Checkpoint,
    statistics: Statistics,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    tune_for: PrecisionPlan | None = None,
    smooth: bool = True,
    gptq: bool = True,
    on_step: OnStep = lambda name, done, total: None,
) -> ScaleTable:
    """Choose the scales of all activations and caches, and tune for a precision plan if one is given.

    Args:
        method: how INT8 ranges are found, one of ``ranges.METHODS``; FP8 always covers the largest value.
        tune_for: the plan that smoothing and GPTQ shall serve; its layers may be exported otherwise too,
            smoothing is exact, and tuned codes are used for the precision they were made for alone.
        smooth, gptq: which of the two to do.

    Raises:
        UserError: the statistics are of another checkpoint, lack a tensor, or saw one that is always zero.
    """
    if statistics.checkpoint != source.digest:
        raise UserError(f"These statistics are not of the checkpoint {source.folder}; calibrate it.")
    if not statistics.samples:
        raise UserError("The statistics hold no samples; calibrate with some.")
    layers: dict[str, LayerSpec] = {
        layer.name: layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)
    }
    table = ScaleTable(source.digest, statistics.data_digest, len(statistics.samples))
    if tune_for and not statistics.keep:
        raise UserError(
            "These statistics keep no rows of the activations, so nothing can be tuned; calibrate again."
        )
    if tune_for and smooth:
        tune_for.check(source.config)
        table.smoothing = find_smoothing(
            source, tune_for, layers, statistics, method, percentile, partial(on_step, "smoothing")
        )
    inputs = _Inputs(source, statistics, table.smoothing)
    for index, layer in enumerate(layers):
        on_step("ranges", index, len(layers))
        table.activations[layer] = _activation(
            layer, inputs.of(layer), len(statistics.samples), method, percentile
        )
    table.caches = _caches(source, statistics, table.smoothing)
    if tune_for:
        table.tuned_for = tune_for.name
        if gptq:
            weights = FoldedWeights(source, table.smoothing)
            table.tuned = tune_weights(tune_for, layers, weights, inputs.of, partial(on_step, "GPTQ"))
    return table


class _Inputs:
    """Statistics of layers' inputs, with the smoothing in them; those of the last layer are kept."""

    def __init__(self, source: Checkpoint, statistics: Statistics, smoothing: dict[str, np.ndarray]) -> None:
        self._statistics, self._observed = statistics, observed_as(source.config)
        self._factors = {
            name: smoothing[folding.producer]
            for folding in foldings(source.config)
            if folding.producer in smoothing
            for name in folding.consumers
        }
        self._last: tuple[str, TensorStatistics] | None = None

    def of(self, layer: str) -> TensorStatistics:
        name = self._observed[layer]
        if name not in self._statistics.tensors:
            raise UserError(f"The statistics have nothing of the input of {layer}; calibrate again.")
        if self._last is None or self._last[0] != name:
            seen = self._statistics.tensors[name]
            factors = self._factors.get(layer)
            self._last = (name, seen if factors is None else seen.divided(factors))
        return self._last[1]


def _activation(
    layer: str, seen: TensorStatistics, samples: int, method: str, percentile: float
) -> ActivationScale:
    amax = find_amax(seen, method, percentile)
    if not amax > 0:
        raise UserError(
            f"The input of {layer} is zero in all of the calibration data, so it has no scale; use other"
            " data."
        )
    return ActivationScale(
        int8=amax / QUANTIZED_MAX["int8"],
        fp8=seen.amax / QUANTIZED_MAX["fp8"],
        method=method if method != "percentile" else f"percentile {percentile:g}",
        range=(seen.minimum, seen.maximum),
        samples=samples,
        histogram=seen.digest,
    )


def _caches(
    source: Checkpoint, statistics: Statistics, smoothing: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Largest magnitudes of keys (rotated) and values per head."""
    decoder = source.config.decoder
    caches: dict[str, dict[str, np.ndarray]] = {}
    for layer in range(decoder.layers):
        attention = f"decoder.layers.{layer}.self_attn"
        caches[attention] = {}
        for state in ("key", "value"):
            name = f"{attention}/{state}"
            if name not in statistics.tensors:
                raise UserError(
                    f"The statistics have nothing of the {state} cache of {attention}; calibrate again."
                )
            largest = statistics.tensors[name].channel_max
            if state == "value" and f"{attention}.v_proj" in smoothing:
                largest = largest / smoothing[f"{attention}.v_proj"]
            heads = largest.reshape(decoder.kv_heads, decoder.head_dim).max(axis=1)
            # A head that was silent has the codes 0 with any scale.
            caches[attention][state] = np.where(heads > 0, heads, 1).astype(np.float32)
    return caches
