"""A pytest plug-in for environments without torch: it stands in for ``tests/conftest.py``, which needs torch.

The bundle of ``tiny_bundle`` is exported by another interpreter; ``DSVL_TEST_BUNDLE`` is its folder. Tests
that need a package or a fixture that is not there are skipped, with its name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from dsvl_export import cli
from reference.tiny import TINY
from reference.tiny.pictures import draw
from runtimes.bundle import Bundle
from tests.dsvl_export.command_line import Done

BUNDLE = "DSVL_TEST_BUNDLE"
# Packages of the export and of other backends; tomllib is part of Python from 3.11.
ABSENT = {
    "coremltools", "executorch", "onnx", "openai", "playwright", "ray", "skimage", "tensorrt_rtx", "tomllib", "torch",
    "transformers",
}  # fmt: skip
MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def tiny_bundle() -> Bundle:
    """The tiny checkpoint in fp32 and fp16; tests must not change it."""
    return Bundle.open(os.environ[BUNDLE])


@pytest.fixture
def bundle_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dsvl-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{seed}.png" for seed in range(4)]
    for seed, file in enumerate(files):
        draw((seed, 1234))[0].save(file)
    return files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose fixtures are not here."""
    for item in items:
        assert isinstance(item, pytest.Function)
        known = item._fixtureinfo.name2fixturedefs
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        absent = [
            name
            for name in item.fixturenames
            if name not in known and name not in parameters and name != "request"
        ]
        if absent:
            item.add_marker(pytest.mark.skip(reason=f"fixture {absent[0]} needs torch"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip modules that import an absent package."""
    report = yield
    absent = MISSING.findall(str(report.longrepr)) if report.failed else []
    if absent and absent[-1] in ABSENT:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {absent[-1]}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Skip tests whose fixtures import an absent package."""
    return (yield from _skip_without_package())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip tests that import an absent package."""
    return (yield from _skip_without_package())


def _skip_without_package() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ABSENT:
            pytest.skip(f"needs {error.name}")
        raise
