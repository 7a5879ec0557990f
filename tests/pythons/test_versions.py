"""The Python versions that the project names are the ones that it tests."""

from __future__ import annotations

import sys

import pytest

from tests.oldest.lane import PROJECT, ROOT
from tests.pythons.lane import VERSIONS, find_python

CLASSIFIER = "Programming Language :: Python :: "


def test_classifiers_and_readme_name_the_tested_versions() -> None:
    named = [text.removeprefix(CLASSIFIER) for text in PROJECT["classifiers"] if text.startswith(CLASSIFIER)]
    assert set(named) == {*VERSIONS, "3.11"}
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert f"(Python {named[0]} to {named[-1]})" in (ROOT / "README.md").read_text()


def test_an_interpreter_is_found_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert find_python("3.11") == sys.executable
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_python("9.99") is None
