"""Sensitivities and the plans found from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calibration.budget_search import Budget, BudgetSearch, greedy_path
from calibration.data import load_data
from calibration.evaluation import Cost, Evaluation
from calibration.planned_model import planned_model
from calibration.precision_plan import LayerPrecision, PrecisionPlan, Rule
from calibration.quantized_weights import QuantizedWeights
from calibration.sensitivity import SENSITIVITY_FILE, Sensitivity, SensitivityRow, measure_sensitivity
from runtimes.errors import UserError
from tests.calibration.calibrated import Calibrated


@pytest.fixture(scope="module")
def measured(tiny_calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    samples = load_data("bundled", 128).samples[::16]
    folder = tmp_path_factory.mktemp("sensitivity")
    return measure_sensitivity(tiny_calibrated.source, tiny_calibrated.embedding, samples, folder)


@pytest.fixture(scope="module")
def search(tiny_calibrated: Calibrated, measured: Sensitivity) -> BudgetSearch:
    source = tiny_calibrated.source
    held_out = load_data("bundled", 128).samples[4::32]
    assert not {sample.digest for sample in held_out} & set(measured.samples)
    evaluation = Evaluation(source, tiny_calibrated.embedding, held_out, source.load_model())
    return BudgetSearch(
        measured, lambda plan: evaluation.measure_cost(planned_model(QuantizedWeights(source, plan))), "found"
    )


@pytest.mark.full
def test_every_layer_is_measured_alone(measured: Sensitivity) -> None:
    linear = [row for row in measured.rows if row.precision == "int4-g32"]
    assert len(measured.rows) == 68 + 2 * len(linear)
    assert {row.layer for row in measured.rows} == set(measured.floats)
    four = sum(row.kl for row in linear)
    eight = sum(row.kl for row in measured.rows if row.precision == "int8-weights")
    assert 0 < 20 * eight < four
    assert all(0 <= row.kept <= 1 for row in measured.rows)


@pytest.mark.full
def test_sensitivities_go_on(tiny_calibrated: Calibrated, measured: Sensitivity, tmp_path: Path) -> None:
    """What is known is not measured again; one layer measured anew gives the same."""
    samples = load_data("bundled", 128).samples[::16]
    dropped = measured.rows[40]
    rows = [row for row in measured.rows if row is not dropped]
    replace(measured, rows=rows).save(tmp_path / SENSITIVITY_FILE)
    steps: list[str] = []
    again = measure_sensitivity(
        tiny_calibrated.source, tiny_calibrated.embedding, samples, tmp_path,
        on_step=lambda name, done, total: steps.append(name),
    )  # fmt: skip
    assert [step for step in steps if " in " in step] == [f"{dropped.layer} in {dropped.precision}"]
    assert again.rows[40].kl == pytest.approx(dropped.kl, rel=1e-3)
    assert [(row.layer, row.precision) for row in again.rows] == [
        (row.layer, row.precision) for row in measured.rows
    ]
    with pytest.raises(UserError, match="measured on another checkpoint, other data or other scales"):
        measure_sensitivity(tiny_calibrated.source, tiny_calibrated.embedding, samples[1:], tmp_path)
    with pytest.raises(UserError, match="need a scale table"):
        measure_sensitivity(tiny_calibrated.source, tiny_calibrated.embedding, samples, tmp_path, ["int8"])
    for candidate, sentence in (("int3", "no precision 'int3'"), ("float", "leave it out")):
        with pytest.raises(UserError, match=sentence):
            measure_sensitivity(
                tiny_calibrated.source, tiny_calibrated.embedding, samples, tmp_path, [candidate]
            )
    with pytest.raises(UserError, match="There is no .*; make it"):
        Sensitivity.load(tmp_path / "nowhere")


@pytest.mark.full
def test_plans_beat_uniform_ones_of_their_size(tiny_calibrated: Calibrated, measured: Sensitivity) -> None:
    """On the mean over all samples that were not measured: rare answers cost a thousand times more than most."""
    source = tiny_calibrated.source
    held_out = [sample for index, sample in enumerate(load_data("bundled", 128).samples) if index % 16]
    evaluation = Evaluation(source, tiny_calibrated.embedding, held_out, source.load_model())

    def measure(plan: PrecisionPlan) -> Cost:
        return evaluation.measure_cost(planned_model(QuantizedWeights(source, plan)))

    search = BudgetSearch(measured, measure)
    eight = Rule("*", LayerPrecision("int8-weights"))
    for name in ("int8-weights", "int4-g32"):
        rules = (
            (eight,) if name == "int8-weights" else (eight, Rule("*", LayerPrecision.parse(name), "linear"))
        )
        given = {row.layer: row.bytes for row in measured.rows if row.precision == "int8-weights"}
        given |= {row.layer: row.bytes for row in measured.rows if row.precision == name}
        uniform = measure(PrecisionPlan(name, rules=rules))
        found = search.find_best(Budget("bytes", sum(given.values())))
        assert found.bytes <= sum(given.values())
        assert found.cost.kl < uniform.kl, name


@pytest.mark.full
def test_budgets_are_kept(search: BudgetSearch) -> None:
    for text in ("kl=0.0001", "accuracy=1", "bytes=3M"):
        budget = Budget.parse(text)
        found = search.find_best(budget)
        assert budget.is_met(found)
        assert found.bytes < 11e6 / 3
    front = search.measure_front()
    assert [point.bytes for point in front] == sorted((point.bytes for point in front), reverse=True)
    assert front[0].cost.kl < 1e-9 < front[-1].cost.kl
    with pytest.raises(UserError, match="The smallest plan takes"):
        search.find_best(Budget("bytes", 1000))


def test_a_sum_that_misbehaves_is_repaired() -> None:
    """Two layers that are harmless alone and ruinous together."""
    rows = [
        SensitivityRow("a", "int4-g32", 0.001, 1, 10),
        SensitivityRow("b", "int4-g32", 0.002, 1, 10),
        SensitivityRow("c", "int4-g32", 0.5, 1, 10),
    ]
    known = Sensitivity("0", "fp32", [], None, dict.fromkeys("abc", 100), rows)

    def measure(plan: PrecisionPlan) -> Cost:
        layers = {rule.layers for rule in plan.rules}
        return Cost(5.0 if {"a", "b"} <= layers else 0.01 * len(layers), 1.0)

    search = BudgetSearch(known, measure)
    assert [len(step) for step in greedy_path(known)] == [0, 1, 2, 3]
    found = search.find_best(Budget("kl", 0.02))
    assert [rule.layers for rule in found.plan.rules] == ["a"]
    assert search.measure(2).predicted_kl < 0.02 < search.measure(2).cost.kl
    with pytest.raises(UserError, match="Not even all layers in fp32 keep the budget"):
        BudgetSearch(known, lambda plan: Cost(1.0, 0.0)).find_best(Budget("kl", 0.5))


@pytest.mark.parametrize(
    "text", ["kl", "kl=", "kl=-1", "kl=nan", "accuracy=1.5", "size=3M", "bytes=3X", "bytes=0"]
)
def test_bad_budgets(text: str) -> None:
    with pytest.raises(UserError, match="is not valid; give one like kl=0.02"):
        Budget.parse(text)
    assert Budget.parse("bytes=900M").value == 900e6
