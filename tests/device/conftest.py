"""The bundle under test: ``DSVL_TEST_BUNDLE``, or tiny's where the other tests run too.

On a device, from the source distribution, after ``dsvl-export build-engine`` where engines are needed:

    DSVL_TEST_BUNDLE=my-bundle python -m pytest --confcutdir=tests/device tests/device

``--confcutdir`` keeps pytest from loading ``tests/conftest.py``, which imports torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.session import Execution

BUNDLE = "DSVL_TEST_BUNDLE"
TINY = [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]  # pairs of the fixture tiny_bundle
Pair = tuple[str, str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument ``pair`` for each backend and precision of the bundle."""
    if "pair" in metafunc.fixturenames:
        folder = os.environ.get(BUNDLE)
        pairs = Bundle.open(folder).choices() if folder else TINY
        metafunc.parametrize("pair", pairs, ids="-".join, scope="session")


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """The bundle under test."""
    if folder := os.environ.get(BUNDLE):
        return Bundle.open(folder)
    try:
        tiny: Bundle = request.getfixturevalue("tiny_bundle")
    except pytest.FixtureLookupError:
        pytest.fail(f"Set the variable {BUNDLE} to the folder of a bundle.")
    return tiny


@pytest.fixture(scope="session")
def picture(bundle: Bundle) -> Path:
    """An image of the bundle's goldens."""
    images = sorted((bundle.folder / "goldens/images").glob("*.png"))
    if not images:
        pytest.skip("the bundle has no goldens with an image")
    return images[0]


def execution_of(bundle: Bundle, pair: Pair) -> Execution:
    """How this machine runs the decoder of a backend and precision."""
    return load_backend(pair[0]).execution(bundle.artifact("decoder", *pair))


@pytest.fixture(scope="session")
def execution(bundle: Bundle, pair: Pair) -> Execution:
    """How this machine runs a pair; the test is skipped, with the reason, where it cannot."""
    found = execution_of(bundle, pair)
    if not found.runnable:
        pytest.skip(f"{' '.join(pair)}: {found}")
    return found
