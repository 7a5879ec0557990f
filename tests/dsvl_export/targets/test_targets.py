"""``targets``, ``plan`` and ``export`` say the same of every target, backend and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.precision_plan import recipe_names, recipe_names_with_base
from dsvl_export.compilers.registry import compiler_names
from dsvl_export.exporter.export import export
from dsvl_export.exporter.staging import Staging
from dsvl_export.planning.plan import Planner, Request
from dsvl_export.targets.targets import load_targets
from reference.checkpoint.checkpoint import open_checkpoint
from reference.trace import PRECISION_DTYPES
from runtimes.errors import UserError

SHIPPED = [*PRECISION_DTYPES, *recipe_names()]


class WorkBegins(Exception):
    """All checks of an export are behind it."""


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(open_checkpoint("tiny").config)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Staging) -> None:
        raise WorkBegins

    monkeypatch.setattr(Staging, "open", begin)
    source = open_checkpoint("tiny")
    monkeypatch.setattr("dsvl_export.exporter.export.open_checkpoint", lambda name, **_: source)


def accepted(check: Callable[[], object]) -> bool:
    try:
        check()
    except UserError as error:
        assert str(error).endswith("."), error
        return False
    except WorkBegins:
        pass
    return True


def by_plan(planner: Planner, target: str, backend: str, precision: str) -> bool:
    return accepted(lambda: planner.check(load_targets()[target], Request(backend, precision, 1024)))


def by_export(folder: Path, target: str, backend: str, precision: str) -> bool:
    return accepted(lambda: export("tiny", folder / "b", backend, [precision], target=target))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("target", load_targets())
def test_targets_plan_and_export_agree(planner: Planner, target: str, tmp_path: Path) -> None:
    for backend in compiler_names():
        listed = set(load_targets()[target].backends.get(backend, []))
        assert {name for name in SHIPPED if by_plan(planner, target, backend, name)} == listed, backend
        assert {name for name in SHIPPED if by_export(tmp_path, target, backend, name)} == listed, backend


@pytest.mark.usefixtures("no_work")
def test_plan_and_export_agree_on_other_bases(planner: Planner, tmp_path: Path) -> None:
    for target, backend in (("cpu", "onnxruntime"), ("iphone", "coreai"), ("android", "executorch")):
        for name in recipe_names_with_base():
            found = [by_plan(planner, target, backend, name), by_export(tmp_path, target, backend, name)]
            assert found[0] == found[1], (target, backend, name)
    assert not by_plan(planner, "cpu", "onnxruntime", "8da4w-fp16")  # ONNX Runtime wants a base of fp32
    assert not by_plan(planner, "iphone", "coreai", "int8-fp32")  # the phone has no fp32
    assert by_plan(planner, "mac", "coreai", "int8-fp32")


def test_a_plan_without_the_compiler_is_judged_by_the_target(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise UserError(f"Exporting to {name} needs something.")

    monkeypatch.setattr("dsvl_export.planning.plan.load_compiler", missing)
    for name in SHIPPED:
        for target in load_targets().values():
            for backend, listed in target.backends.items():
                assert by_plan(planner, target.name, backend, name) == (name in listed)
    plan = planner.plan(load_targets()["android"], Request("executorch", "8da8w", 1000))
    assert not plan.exact
