"""Sensitivity: what quantizing one layer alone does to the answers, for every layer and precision."""

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
from calibration.precision_plan import GROUPS, LayerPrecision, LayerSpec, component_layers
from calibration.quantized_program import PALETTE, fake_quantize, round_trip
from calibration.quantized_weights import FoldedWeights, find_weight_scale
from calibration.scale_table import ScaleTable
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.bundle.files import read_json, write_json
from runtimes.errors import UserError

CANDIDATES = ("int4-g128", "int4-g32", "int8-weights")
EIGHT_BIT_BLOCK = 128  # inputs that share a stored scale where weights alone have 8 bits
SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True)
class Row:
    """One layer in one precision: the cost of it alone, and the bytes of its weight."""

    layer: str
    precision: str
    kl: float
    kept: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """Rows of a checkpoint; ``floats`` are the bytes of each layer's weight in the base precision."""

    checkpoint: str  # SHA-256
    base: str
    samples: list[str]  # digests
    scales: str | None  # digest of the scale table
    floats: dict[str, int]
    rows: list[Row]

    def save(self, file: Path) -> None:
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> Sensitivity:
        """Raises UserError where the file is missing or no sensitivities."""
        if not file.is_file():
            raise UserError(f"There is no {file}; measure it with 'dsvl-export sensitivity'.")
        raw: dict[str, Any] = read_json(file)
        try:
            return cls(**{**raw, "rows": [Row(**row) for row in raw["rows"]]})
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} holds no sensitivities that can be read ({error}).") from error


def weight_bytes(layer: LayerSpec, precision: LayerPrecision, base: str) -> int:
    """Bytes of a layer's weight with its scales, as an artifact stores them."""
    count, size = prod(layer.weight), {"fp32": 4, "fp16": 2}[base]
    if precision.kind == "float":
        return count * size
    if precision.kind == "int4":
        return count // 2 + count // precision.group * size
    if precision.kind == "palette4":
        return count // 2 + layer.weight[0] // precision.group * PALETTE * size
    if precision.kind == "int8-weights" and layer.kind == "linear":
        blocks = -(-layer.inputs // EIGHT_BIT_BLOCK)
        return layer.weight[0] * blocks * (EIGHT_BIT_BLOCK + size)
    return count + layer.weight[0] * size


def possible(layer: LayerSpec, precision: LayerPrecision) -> bool:
    """Whether a layer can have a precision."""
    if precision.kind not in GROUPS:
        return True
    return layer.kind == "linear" and precision.grouped(layer)[0] % precision.group == 0


def measure_sensitivity(
    source: Checkpoint,
    embedding_file: Path,
    samples: Sequence[Sample],
    folder: Path,
    candidates: Sequence[str] = CANDIDATES,
    table: ScaleTable | None = None,
    base: str = "fp32",
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
    spread: Callable[..., Iterator[tuple[int, Row]]] | None = None,
) -> Sensitivity:
    """Quantize every layer alone in every candidate precision; what is done is kept in ``folder``.

    Args:
        table: scales of activations, for candidates that quantize those; its smoothing is folded in.
        spread: measures layers and precisions elsewhere, giving the number of each in a list and its row.

    Raises:
        UserError: a candidate needs scales and there is no table, or the folder is of other measurements.
    """
    precisions = [_parse(candidate) for candidate in candidates]
    if table is None and any(precision.quantizes_activations for precision in precisions):
        raise UserError(
            "Precisions that quantize activations need a scale table; give one made by 'calibrate'."
        )
    layers = [layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)]
    floats = {layer.name: weight_bytes(layer, LayerPrecision("float"), base) for layer in layers}
    if table and table.checkpoint != source.digest:
        raise UserError(
            f"The scale table was made for another checkpoint than {source.folder}; calibrate it."
        )
    for precision in precisions:
        if table and precision.quantizes_activations:
            for layer in layers:
                table.activation(layer.name, precision.kind)
    digests = [sample.digest for sample in samples]
    result = Sensitivity(source.digest, base, digests, table.digest if table else None, floats, [])
    file = folder / SENSITIVITY_FILE
    if file.exists():
        known = Sensitivity.load(file)
        if replace(known, rows=[], floats=floats) != result:
            raise UserError(
                f"{file} was measured on another checkpoint, other data or other scales; give another folder."
            )
        result.rows.extend(known.rows)
    done = {(row.layer, row.precision) for row in result.rows}
    wanted = [(layer, p) for layer in layers for p in precisions if possible(layer, p)]
    todo = [(layer, p) for layer, p in wanted if (layer.name, str(p)) not in done]
    if not todo:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if spread:
        on_step("answering", 0, len(samples))
        measured = spread(todo)
    else:
        on_answer = partial(on_step, "answering")
        trials = Trials(source, embedding_file, samples, table, base, on_answer)
        measured = ((index, trials.row(*each)) for index, each in enumerate(todo))
    for index, row in measured:
        result.rows.append(row)
        result.save(file)
        layer, precision = todo[index]
        on_step(f"{layer.name} in {precision}", len(result.rows), len(wanted))
    order = {(layer.name, str(precision)): place for place, (layer, precision) in enumerate(wanted)}
    result.rows.sort(key=lambda row: order.get((row.layer, row.precision), len(order)))
    result.save(file)
    on_step("done", len(wanted), len(wanted))
    return result


class Trials:
    """Measures single layers against the answers of the whole model in fp32."""

    def __init__(
        self,
        source: Checkpoint,
        embedding_file: Path,
        samples: Sequence[Sample],
        table: ScaleTable | None,
        base: str,
        on_answer: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._trial, self._base = Trial(source, table), base
        self._evaluation = Evaluation(source, embedding_file, samples, self._trial.model, on_answer)

    def row(self, layer: LayerSpec, precision: LayerPrecision) -> Row:
        with self._trial.quantized(layer.name, precision):
            cost = self._evaluation.cost(self._trial.model, vision=not layer.name.startswith("decoder."))
        size = weight_bytes(layer, precision, self._base)
        return Row(layer.name, str(precision), cost.kl, cost.kept, size)


def _parse(candidate: str) -> LayerPrecision:
    try:
        precision = LayerPrecision.parse(candidate)
    except ValueError as error:
        raise UserError(f"The candidate cannot be used: {error}.") from error
    if precision.kind == "float":
        raise UserError("The candidate float is what the others are measured against; leave it out.")
    return precision


class Trial:
    """The fp32 model with single layers quantized for a while."""

    def __init__(self, source: Checkpoint, table: ScaleTable | None) -> None:
        self._weights = FoldedWeights(source, table.smoothing if table else {})
        self._table = table
        self._changed: dict[str, Tensor] = {}
        self.model = source.load_model(load=self._load)

    def _load(self, parameter: str) -> Tensor:
        """Read each time a layer runs where weights are streamed, and once otherwise."""
        changed = self._changed.get(parameter)
        return self._weights.load(parameter) if changed is None else changed

    @contextmanager
    def quantized(self, layer: str, precision: LayerPrecision) -> Iterator[None]:
        module: Any = self.model.get_submodule(layer)
        name = f"{layer}.weight"
        weight = self._weights.load(name).float()
        changed = round_trip(weight, find_weight_scale(weight, precision, layer), precision)
        self._changed[name] = changed
        held = module.weight
        if not held.is_meta:
            module.weight = nn.Parameter(changed, requires_grad=False)
        hook = None
        if precision.quantizes_activations:
            assert self._table
            scale = torch.tensor(self._table.activation(layer, precision.kind))
            hook = module.register_forward_pre_hook(lambda _, args: fake_quantize(args[0], scale, precision))
        try:
            yield
        finally:
            del self._changed[name]
            module.weight = held
            if hook:
                hook.remove()
