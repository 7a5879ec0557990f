"""A pytest plug-in for environments without torch: it stands in for ``tests/conftest.py``, which needs torch.

The bundle of ``tiny_bundle`` is exported by another interpreter; ``DSVL_TEST_BUNDLE`` is its folder. Tests
that need a package or a fixture that is not there are skipped, with its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

from runtimes.bundle.bundle import Bundle
from tests.fixtures import bundle_copy, pictures, run, state_folder, tiny_copy

__all__ = ["bundle_copy", "pictures", "run", "state_folder", "tiny_copy"]  # fixtures
BUNDLE = "DSVL_TEST_BUNDLE"
# Packages of the export and of other backends; tomllib is part of Python from 3.11.
ABSENT = {
    "coremltools", "executorch", "onnx", "openai", "playwright", "ray", "skimage", "tensorrt_rtx", "tomllib", "torch",
    "transformers",
}  # fmt: skip
MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


@pytest.fixture(scope="session")
def tiny_bundle() -> Bundle:
    """The tiny checkpoint in fp32 and fp16; tests must not change it."""
    return Bundle.open(os.environ[BUNDLE])


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
