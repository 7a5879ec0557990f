"""The command line, run in the tests' process, and TensorRT bundles that several files test."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from dsvl_export.exporter.export import export
from runtimes.bundle.bundle import Bundle
from runtimes.pipeline import Pipeline
from tests.dsvl_export.serving.in_browser import BROWSER
from tests.dsvl_export.serving.server import Served, serving
from tests.fixtures import run

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is there for Linux on x86-64 alone")


@pytest.fixture(scope="session")
def rtx(trt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tiny's engines of TensorRT-RTX; tests must not change them."""
    return export(
        "tiny", tmp_path_factory.mktemp("rtx") / "bundle", "tensorrt_rtx", ("fp16", "int8", "fp8", "int4")
    )


@pytest.fixture(scope="session")
def jetson(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tiny for JetPack 6; tests must not change it."""
    folder = tmp_path_factory.mktemp("jetson") / "bundle"
    return export("tiny", folder, "tensorrt", ("fp16", "int8", "int8-int4"), target="jetson-orin")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def alone(tiny_bundle: Bundle) -> Pipeline:
    """What one user gets from Python."""
    return Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1)


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle) -> Iterator[Served]:
    """A server on the tiny bundle."""
    with serving(tiny_bundle) as found:
        yield found
