"""``sensitivity`` and ``plan-precision``: measured, written down, drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from calibration.budget_search import Budget, BudgetSearch, MeasuredPlan
from calibration.data import Sample, load_data
from calibration.evaluation import Cost, Evaluation
from calibration.planned_model import planned_model
from calibration.precision_plan import (
    LayerPrecision,
    LayerSpec,
    PrecisionPlan,
    Rule,
    component_layers,
    recipe_names,
)
from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from calibration.sensitivity import (
    DEFAULT_CANDIDATES,
    SENSITIVITY_FILE,
    Sensitivity,
    SensitivityMeter,
    SensitivityRow,
    can_quantize,
    measure_sensitivity,
    weight_bytes,
)
from dsvl_export.cluster.ray_cluster import Spread
from dsvl_export.quantization.calibrate import checkpoint_here, token_embedding
from reference.checkpoint.checkpoint import Checkpoint
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS
from runtimes.errors import UserError

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FoundPlan:
    """The plan for a budget, the front it was chosen from, and the uniform plans beside it."""

    budget: str
    chosen: MeasuredPlan
    front: list[MeasuredPlan]
    uniform: list[MeasuredPlan]
    picture: Path | None

    def to_dict(self) -> dict[str, Any]:
        def row(point: MeasuredPlan) -> dict[str, Any]:
            kept = {"bytes": point.bytes, "predicted_kl": point.predicted_kl}
            return {"name": point.plan.name, **kept, "kl": point.cost.kl, "kept": point.cost.kept}

        return {
            "budget": self.budget,
            "chosen": {**row(self.chosen), "plan": self.chosen.plan.to_dict()},
            "front": [row(point) for point in self.front],
            "uniform": [row(point) for point in self.uniform],
            "picture": str(self.picture) if self.picture else None,
        }


def sensitivity(
    source: Checkpoint,
    folder: Path,
    data: str,
    samples: int,
    seed: int,
    candidates: Sequence[str] | None,
    scales: Path | None,
    on_step: OnStep,
    spread: Spread | None = None,
) -> tuple[Sensitivity, Path | None]:
    """Measure and draw into ``folder``; the picture is None where matplotlib is missing.

    Args:
        spread: measures layers on other machines; the result is the same.
    """
    chosen = load_data(data, samples, seed).samples
    table = ScaleTable.load(scales.expanduser()) if scales else None

    def measured(todo: Sequence[tuple[LayerSpec, LayerPrecision]]) -> Iterator[tuple[int, SensitivityRow]]:
        assert spread
        found_at = str(scales.expanduser()) if scales else None
        where = (str(source.folder), source.digest, tuple(chosen), found_at)
        return spread(row_of, [(*where, layer, precision) for layer, precision in todo])

    with token_embedding(source) as embedding:
        found = measure_sensitivity(
            source, embedding, chosen, folder, candidates or DEFAULT_CANDIDATES, table, on_step=on_step,
            measure_remotely=measured if spread else None,
        )  # fmt: skip
    picture = folder / "sensitivity.svg"
    pictures = _pictures()
    if pictures is None:
        return found, None
    pictures.draw_sensitivity(found, picture)
    return found, picture


def row_of(
    folder: str,
    digest: str,
    samples: tuple[Sample, ...],
    scales: str | None,
    layer: LayerSpec,
    precision: LayerPrecision,
) -> SensitivityRow:
    """One layer in one precision, on the machine that this runs on."""
    return _trials_here(folder, digest, samples, scales).measure(layer, precision)


@cache
def _trials_here(
    folder: str, digest: str, samples: tuple[Sample, ...], scales: str | None
) -> SensitivityMeter:
    source, embedding = checkpoint_here(folder, digest)
    table = ScaleTable.load(Path(scales)) if scales else None
    return SensitivityMeter(source, embedding, samples, table, "fp32")


def find_plan(
    source: Checkpoint,
    measured: Path,
    budget: str,
    output: Path,
    data: str,
    samples: int,
    seed: int,
    scales: Path | None,
    front: bool,
    on_step: OnStep,
) -> FoundPlan:
    """Choose a plan, write it to ``output``, and draw the front beside it.

    Raises:
        UserError: the budget cannot be kept, or all data was used for the sensitivities.
    """
    wanted = Budget.parse(budget)
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"The plan's file {output} must end in .yaml.")
    if output.stem in (*PRECISION_DTYPES, *recipe_names()):
        raise UserError(f"{output.stem} is the name of a shipped precision; give the plan's file another.")
    known = Sensitivity.load(measured / SENSITIVITY_FILE if measured.is_dir() else measured)
    if known.checkpoint != source.digest:
        raise UserError(f"{measured} was measured on another checkpoint than {source.folder}.")
    everything = load_data(data, samples + len(known.samples), seed).samples
    seen = set(known.samples)
    held_out = [sample for sample in everything if sample.digest not in seen][:samples]
    if not held_out:
        raise UserError(
            "All samples were used to measure the sensitivities; give more data to check a plan with."
        )
    table = ScaleTable.load(scales.expanduser()) if scales else None
    tried = 0
    with token_embedding(source) as embedding:
        evaluation = Evaluation(
            source,
            embedding,
            held_out,
            source.load_model(),
            lambda done, total: on_step("answering", done, total),
        )

        def measure(plan: PrecisionPlan) -> Cost:
            nonlocal tried
            tried += 1
            on_step(f"measuring plan {tried}", 0, 1)
            return evaluation.measure_cost(planned_model(QuantizedWeights(source, plan, table)))

        search = BudgetSearch(known, measure, output.stem)
        chosen = search.find_best(wanted)
        uniform = _uniform(source, known, measure) if front else []
        points = search.measure_front() if front else search.measured_plans
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen.plan.save(
        output,
        f"Found by plan-precision for {budget}: {chosen.bytes} bytes of weights,\n"
        f"KL divergence {chosen.cost.kl:.3g} nats per token,"
        f" {chosen.cost.kept:.1%} of {len(held_out)} answers kept.",
    )
    pictures, picture = _pictures(), output.with_suffix(".svg")
    if pictures is None or not front:
        return FoundPlan(budget, chosen, points, uniform, None)
    pictures.draw_front(chosen, points, uniform, budget, picture)
    return FoundPlan(budget, chosen, points, uniform, picture)


def _uniform(
    source: Checkpoint, known: Sensitivity, measure: Callable[[PrecisionPlan], Cost]
) -> list[MeasuredPlan]:
    """Every measured precision given to all layers that can have it; the others take the next larger."""
    layers = [layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)]
    names = sorted({row.precision for row in known.rows}, key=lambda name: _total(layers, name, known.base))
    points = []
    for index, name in enumerate(names):
        fallback = [LayerPrecision.parse(other) for other in names[index:]]
        given = {layer.name: next((p for p in fallback if can_quantize(layer, p)), None) for layer in layers}
        plan = PrecisionPlan(
            f"all {name}", known.base, rules=tuple(Rule(layer, p) for layer, p in given.items() if p)
        )
        size = sum(
            weight_bytes(layer, given[layer.name] or LayerPrecision("float"), known.base) for layer in layers
        )
        points.append(MeasuredPlan(plan, size, 0.0, measure(plan)))
    return points


def _total(layers: Sequence[LayerSpec], name: str, base: str) -> int:
    precision = LayerPrecision.parse(name)
    return sum(weight_bytes(layer, precision, base) for layer in layers if can_quantize(layer, precision))


def _pictures() -> Any:
    """The module that draws; None where matplotlib is missing."""
    try:
        from dsvl_export.quantization import plots as pictures
    except ImportError:
        return None
    return pictures
