"""Sensitivity: the cost of quantizing one layer alone, for every layer and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.data import Sample
from calibration.evaluation import Evaluation
from calibration.precision_plan import DEFAULT_GROUP_SIZES, LayerPrecision, LayerSpec, component_layers
from calibration.quantized_program import PALETTE_SIZE, fake_quantize, fake_quantize_weight
from calibration.quantized_weights import FoldedWeights, find_weight_scale
from calibration.scale_table import ScaleTable
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.bundle.files import read_json, write_json
from runtimes.errors import UserError

DEFAULT_CANDIDATES = ("int4-g128", "int4-g32", "int8-weights")
INT8_BLOCK = 128  # inputs that share a stored scale in ``int8-weights``
SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True)
class SensitivityRow:
    """A layer in a precision: its cost (as in ``Cost``) and the bytes of its weight."""

    layer: str
    precision: str
    kl: float
    kept: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivities of a checkpoint; ``floats`` has each weight's bytes in the base precision."""

    checkpoint: str  # SHA-256
    base: str
    samples: list[str]  # digests
    scales: str | None  # digest of the scale table
    floats: dict[str, int]
    rows: list[SensitivityRow]

    def save(self, file: Path) -> None:
        """Write the JSON file."""
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> Sensitivity:
        """Read a JSON file.

        Raises:
            UserError: the file is missing, or holds no sensitivities.
        """
        if not file.is_file():
            raise UserError(f"There is no {file}; make it with 'dsvl-export sensitivity'.")
        raw: dict[str, Any] = read_json(file)
        try:
            return cls(**{**raw, "rows": [SensitivityRow(**row) for row in raw["rows"]]})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a readable file of sensitivities ({error}); delete it and run"
                " 'dsvl-export sensitivity' again."
            ) from error


def weight_bytes(layer: LayerSpec, precision: LayerPrecision, base: str) -> int:
    """Return the bytes of a layer's weight and scales, as an artifact stores them."""
    count, size = prod(layer.weight), {"fp32": 4, "fp16": 2}[base]
    if precision.kind == "float":
        return count * size
    if precision.kind == "int4":
        return count // 2 + count // precision.group * size
    if precision.kind == "palette4":
        return count // 2 + layer.weight[0] // precision.group * PALETTE_SIZE * size
    if precision.kind == "int8-weights" and layer.kind == "linear":
        blocks = -(-layer.inputs // INT8_BLOCK)
        return layer.weight[0] * blocks * (INT8_BLOCK + size)
    return count + layer.weight[0] * size


def can_quantize(layer: LayerSpec, precision: LayerPrecision) -> bool:
    """Return whether a layer can have a precision."""
    if precision.kind not in DEFAULT_GROUP_SIZES:
        return True
    return layer.kind == "linear" and precision.group_axis(layer)[0] % precision.group == 0


def measure_sensitivity(
    source: Checkpoint,
    embedding_file: Path,
    samples: Sequence[Sample],
    folder: Path,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    table: ScaleTable | None = None,
    base: str = "fp32",
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
    measure_remotely: Callable[..., Iterator[tuple[int, SensitivityRow]]] | None = None,
) -> Sensitivity:
    """Measure every layer alone in every candidate precision.

    Results are saved in ``folder`` after each layer; the same call resumes.

    Args:
        source: the checkpoint.
        embedding_file: the table that ``write_token_embedding`` wrote.
        samples: the requests to answer.
        folder: where ``SENSITIVITY_FILE`` is written.
        candidates: precisions to measure.
        table: scales of activations, for candidates that quantize them; its smoothing is folded in.
        base: precision of the layers that are not quantized.
        on_step: called with the name of the step, the number of items done and in total.
        measure_remotely: measures a list of layers and precisions on other machines; yields the
            index in the list and the row of each.

    Raises:
        UserError: a candidate needs scales and there is no table, or the folder holds sensitivities
            of another checkpoint, other samples or other scales.
    """
    precisions = [_parse_candidate(candidate) for candidate in candidates]
    if table is None and any(precision.quantizes_activations for precision in precisions):
        raise UserError(
            "Precisions that quantize activations need a scale table; make one with 'dsvl-export calibrate'."
        )
    layers = [layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)]
    floats = {layer.name: weight_bytes(layer, LayerPrecision("float"), base) for layer in layers}
    if table and table.checkpoint != source.digest:
        raise UserError(f"The scale table was made for another checkpoint; calibrate {source.folder}.")
    for precision in precisions:
        if table and precision.quantizes_activations:
            for layer in layers:
                table.activation_scale(layer.name, precision.kind)
    digests = [sample.digest for sample in samples]
    result = Sensitivity(source.digest, base, digests, table.digest if table else None, floats, [])
    file = folder / SENSITIVITY_FILE
    if file.exists():
        saved = Sensitivity.load(file)
        if replace(saved, rows=[], floats=floats) != result:
            raise UserError(
                f"{file} was measured on another checkpoint, other data or other scales;"
                " choose another folder."
            )
        result.rows.extend(saved.rows)
    done = {(row.layer, row.precision) for row in result.rows}
    pairs = [(layer, p) for layer in layers for p in precisions if can_quantize(layer, p)]
    todo = [(layer, p) for layer, p in pairs if (layer.name, str(p)) not in done]
    if not todo:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if measure_remotely:
        on_step("answering", 0, len(samples))
        measured = measure_remotely(todo)
    else:
        on_answer = partial(on_step, "answering")
        meter = SensitivityMeter(source, embedding_file, samples, table, base, on_answer)
        measured = ((index, meter.measure(*pair)) for index, pair in enumerate(todo))
    for index, row in measured:
        result.rows.append(row)
        result.save(file)
        layer, precision = todo[index]
        on_step(f"{layer.name} in {precision}", len(result.rows), len(pairs))
    order = {(layer.name, str(precision)): index for index, (layer, precision) in enumerate(pairs)}
    result.rows.sort(key=lambda row: order.get((row.layer, row.precision), len(order)))
    result.save(file)
    on_step("done", len(pairs), len(pairs))
    return result


class SensitivityMeter:
    """Measurement of single quantized layers against the answers of the fp32 model."""

    def __init__(
        self,
        source: Checkpoint,
        embedding_file: Path,
        samples: Sequence[Sample],
        table: ScaleTable | None,
        base: str,
        on_answer: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load the model and answer the samples; arguments as in ``measure_sensitivity``."""
        self._quantizer, self._base = SingleLayerQuantizer(source, table), base
        self._evaluation = Evaluation(source, embedding_file, samples, self._quantizer.model, on_answer)

    def measure(self, layer: LayerSpec, precision: LayerPrecision) -> SensitivityRow:
        """Measure a layer in a precision."""
        with self._quantizer.quantized_layer(layer.name, precision):
            cost = self._evaluation.measure_cost(
                self._quantizer.model, vision=not layer.name.startswith("decoder.")
            )
        size = weight_bytes(layer, precision, self._base)
        return SensitivityRow(layer.name, str(precision), cost.kl, cost.kept, size)


def _parse_candidate(candidate: str) -> LayerPrecision:
    try:
        precision = LayerPrecision.parse(candidate)
    except ValueError as error:
        raise UserError(f"The candidate {candidate!r} is not valid: {error}.") from error
    if precision.kind == "float":
        raise UserError("The candidate 'float' is the baseline of the others; leave it out.")
    return precision


class SingleLayerQuantizer:
    """The fp32 model, of which one layer at a time can be quantized."""

    def __init__(self, source: Checkpoint, table: ScaleTable | None) -> None:
        """Load the model with the table's smoothing factors folded in."""
        self._weights = FoldedWeights(source, table.smoothing if table else {})
        self._table = table
        self._changed: dict[str, Tensor] = {}
        self.model = source.load_model(load=self._load)

    def _load(self, parameter: str) -> Tensor:
        """Load a parameter: once, or each time a layer runs if weights are streamed."""
        changed = self._changed.get(parameter)
        return self._weights.load(parameter) if changed is None else changed

    @contextmanager
    def quantized_layer(self, layer: str, precision: LayerPrecision) -> Iterator[None]:
        """Quantize a layer of ``model`` inside a ``with`` block."""
        module: Any = self.model.get_submodule(layer)
        name = f"{layer}.weight"
        weight = self._weights.load(name).float()
        changed = fake_quantize_weight(weight, find_weight_scale(weight, precision, layer), precision)
        self._changed[name] = changed
        original = module.weight
        if not original.is_meta:
            module.weight = nn.Parameter(changed, requires_grad=False)
        hook = None
        if precision.quantizes_activations:
            assert self._table
            scale = torch.tensor(self._table.activation_scale(layer, precision.kind))
            hook = module.register_forward_pre_hook(lambda _, args: fake_quantize(args[0], scale, precision))
        try:
            yield
        finally:
            del self._changed[name]
            module.weight = original
            if hook:
                hook.remove()
