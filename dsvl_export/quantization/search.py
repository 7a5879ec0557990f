"""The commands ``sensitivity`` and ``plan-precision``: measurement, result files and plots."""

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
from dsvl_export.quantization.calibrate import open_checkpoint_on_worker, temporary_token_embedding
from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS
from runtimes.errors import UserError

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PlanSearchResult:
    """The plan for a budget, the Pareto front, the uniform plans, and the plot if there is one."""

    budget: str
    chosen: MeasuredPlan
    front: list[MeasuredPlan]
    uniform: list[MeasuredPlan]
    plot: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""

        def row(point: MeasuredPlan) -> dict[str, Any]:
            size = {"bytes": point.bytes, "predicted_kl": point.predicted_kl}
            return {"name": point.plan.name, **size, "kl": point.cost.kl, "kept": point.cost.kept}

        return {
            "budget": self.budget,
            "chosen": {**row(self.chosen), "plan": self.chosen.plan.to_dict()},
            "front": [row(point) for point in self.front],
            "uniform": [row(point) for point in self.uniform],
            "picture": str(self.plot) if self.plot else None,
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
    """Measure the sensitivity of each layer; write the result and a plot into ``folder``.

    If a call is interrupted, the same call resumes.

    Args:
        source: the checkpoint.
        folder: folder of the result.
        data: the samples to measure on, as in ``load_data``.
        samples: number of samples.
        seed: selects the samples.
        candidates: precisions to measure; None is ``DEFAULT_CANDIDATES``.
        scales: folder of a scale table, if any.
        on_step: called with the name of the step, the rows done and all rows.
        spread: measures layers on a cluster; the result is the same.

    Returns:
        The sensitivities, and the file of the plot; None if matplotlib is missing.

    Raises:
        UserError: the data or a candidate is invalid, or the folder holds other measurements.
    """
    selected = load_data(data, samples, seed).samples
    table = ScaleTable.load(scales.expanduser()) if scales else None

    def measure_on_cluster(
        todo: Sequence[tuple[LayerSpec, LayerPrecision]],
    ) -> Iterator[tuple[int, SensitivityRow]]:
        assert spread
        scales_folder = str(scales.expanduser()) if scales else None
        shared = (
            str(source.folder),
            source.choices,
            source.digest,
            source.built_in_prompt,
            tuple(selected),
            scales_folder,
        )
        return spread(measure_row, [(*shared, layer, precision) for layer, precision in todo])

    with temporary_token_embedding(source) as embedding:
        result = measure_sensitivity(
            source, embedding, selected, folder, candidates or DEFAULT_CANDIDATES, table, on_step=on_step,
            measure_remotely=measure_on_cluster if spread else None,
        )  # fmt: skip
    plots, file = _load_plots(), folder / "sensitivity.svg"
    if plots is None:
        return result, None
    plots.draw_sensitivity(result, file)
    return result, file


def measure_row(
    folder: str,
    adapters: tuple[AdapterChoice, ...],
    digest: str,
    built_in_prompt: bool,
    samples: tuple[Sample, ...],
    scales: str | None,
    layer: LayerSpec,
    precision: LayerPrecision,
) -> SensitivityRow:
    """Measure one layer in one precision, in a worker of the cluster."""
    return _open_trials(folder, adapters, digest, built_in_prompt, samples, scales).measure(layer, precision)


@cache
def _open_trials(
    folder: str,
    adapters: tuple[AdapterChoice, ...],
    digest: str,
    built_in_prompt: bool,
    samples: tuple[Sample, ...],
    scales: str | None,
) -> SensitivityMeter:
    source, embedding = open_checkpoint_on_worker(folder, adapters, digest, built_in_prompt)
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
) -> PlanSearchResult:
    """Choose a precision plan within a budget; write it to ``output``, and a plot next to it.

    Raises:
        UserError: the budget cannot be met, or all data was used for the sensitivities.
    """
    limit = Budget.parse(budget)
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"The plan's file {output} must end in .yaml.")
    if output.stem in (*PRECISION_DTYPES, *recipe_names()):
        raise UserError(
            f"{output.stem} is the name of a shipped precision; choose another file name for the plan."
        )
    sensitivities = Sensitivity.load(measured / SENSITIVITY_FILE if measured.is_dir() else measured)
    if sensitivities.checkpoint != source.digest:
        raise UserError(
            f"{measured} was measured on another checkpoint than {source.folder}; run sensitivity again."
        )
    candidates = load_data(data, samples + len(sensitivities.samples), seed).samples
    used = set(sensitivities.samples)
    held_out = [sample for sample in candidates if sample.digest not in used][:samples]
    if not held_out:
        raise UserError(
            "All samples were used to measure the sensitivities. Pass more data, to check the plan with."
        )
    table = ScaleTable.load(scales.expanduser()) if scales else None
    count = 0
    with temporary_token_embedding(source) as embedding:
        evaluation = Evaluation(
            source,
            embedding,
            held_out,
            source.load_model(),
            lambda done, total: on_step("answering", done, total),
        )

        def measure(plan: PrecisionPlan) -> Cost:
            nonlocal count
            count += 1
            on_step(f"measuring plan {count}", 0, 1)
            return evaluation.measure_cost(planned_model(QuantizedWeights(source, plan, table)))

        search = BudgetSearch(sensitivities, measure, output.stem)
        chosen = search.find_best(limit)
        uniform = _uniform_plans(source, sensitivities, measure) if front else []
        points = search.measure_front() if front else search.measured_plans
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen.plan.save(
        output,
        f"Found by plan-precision for {budget}: {chosen.bytes} bytes of weights,\n"
        f"KL divergence {chosen.cost.kl:.3g} nats per token,"
        f" {chosen.cost.kept:.1%} of {len(held_out)} answers kept.",
    )
    plots, file = _load_plots(), output.with_suffix(".svg")
    if plots is None or not front:
        return PlanSearchResult(budget, chosen, points, uniform, None)
    plots.draw_front(chosen, points, uniform, budget, file)
    return PlanSearchResult(budget, chosen, points, uniform, file)


def _uniform_plans(
    source: Checkpoint, sensitivities: Sensitivity, measure: Callable[[PrecisionPlan], Cost]
) -> list[MeasuredPlan]:
    """Measure a plan for each precision, which all layers get, or the next larger one."""
    layers = [layer for name in TRACED_COMPONENTS for layer in component_layers(source.config, name)]
    names = sorted(
        {row.precision for row in sensitivities.rows},
        key=lambda name: _total_bytes(layers, name, sensitivities.base),
    )
    points = []
    for index, name in enumerate(names):
        fallback = [LayerPrecision.parse(other) for other in names[index:]]
        assigned = {
            layer.name: next((p for p in fallback if can_quantize(layer, p)), None) for layer in layers
        }
        plan = PrecisionPlan(
            f"all {name}",
            sensitivities.base,
            rules=tuple(Rule(layer, p) for layer, p in assigned.items() if p),
        )
        size = sum(
            weight_bytes(layer, assigned[layer.name] or LayerPrecision("float"), sensitivities.base)
            for layer in layers
        )
        points.append(MeasuredPlan(plan, size, 0.0, measure(plan)))
    return points


def _total_bytes(layers: Sequence[LayerSpec], name: str, base: str) -> int:
    """Return the bytes of all layers that support a precision."""
    precision = LayerPrecision.parse(name)
    return sum(weight_bytes(layer, precision, base) for layer in layers if can_quantize(layer, precision))


def _load_plots() -> Any:
    """Return the module of the plots; None if matplotlib is missing."""
    try:
        from dsvl_export.quantization import plots
    except ImportError:
        return None
    return plots
