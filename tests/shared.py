"""Artifacts that a test run makes once, also where pytest-xdist runs the tests in several processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.locks import locked


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of an artifact, made by the first process that asks for it; the others wait.

    Tests must not change it.

    Args:
        name: of the artifact; the same name stands for the same content.
        make: is called with a folder that does not exist yet, and fills it.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the run's
        root = root.parent
    shared = root / "shared"
    folder, done = shared / name, shared / f"{name}.done"
    if not done.exists():
        with locked(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                make(folder)
                done.touch()
    return folder


def shared_bundle(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Iterator[Bundle]:
    """For a fixture: a bundle that is made once (see ``made_once``), and which no test has changed at the end."""
    bundle = Bundle.open(made_once(factory, name, make))
    yield bundle
    assert bundle.problems(list(bundle.manifest.files)) == [], f"a test changed the bundle {name}"
