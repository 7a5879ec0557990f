"""The command line, run in the tests' process, and TensorRT bundles that several files test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsvl_export.exporter.export import export
from runtimes.bundle.bundle import Bundle
from runtimes.pipeline import Pipeline
from tests.dsvl_export.compilers.nodes import ray_nodes
from tests.dsvl_export.serving.in_browser import BROWSER
from tests.dsvl_export.serving.server import Served, serving
from tests.fixtures import run
from tests.shared import shared_bundle

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is there for Linux on x86-64 alone")


@pytest.fixture(scope="session")
def rtx(trt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny's engines of TensorRT-RTX; tests must not change them.

    fp16 is built for all GPU architectures that an export builds for, fp8 for those that have it, the others
    for one: a build takes as long for each as for the first.
    """

    def make(folder: Path) -> None:
        export("tiny", folder, "tensorrt_rtx", ("fp16", "fp8"))
        export("tiny", folder, "tensorrt_rtx", ("int8", "int4"), capabilities=(89,))

    yield from shared_bundle(tmp_path_factory, "rtx", make)


@pytest.fixture(scope="session")
def jetson(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny for JetPack 6; tests must not change it."""

    def make(folder: Path) -> None:
        export("tiny", folder, "tensorrt", ("fp16", "int8", "int8-int4"), target="jetson-orin")

    yield from shared_bundle(tmp_path_factory, "jetson", make)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster that several files share; tests leave it with two nodes and without replicas."""
    with ray_nodes(2) as found:
        yield found


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.full)], ids="{} nodes".format)
def nodes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A Ray cluster of two nodes, or of four."""
    if request.param == 2:
        yield request.getfixturevalue("two_nodes")
        return
    with ray_nodes(request.param) as found:
        yield found


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
