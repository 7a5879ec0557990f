"""Every dependency has a lower bound, which the slow lane installs."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.oldest.lane import GROUPS, PROJECT, lowest, requirements


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_every_dependency_has_a_lower_bound(extra: str) -> None:
    assert all("==" in pin for pin in lowest(requirements((extra,))))


def test_the_lowest_version_of_a_requirement() -> None:
    texts = ["onnx>=1.20,<2", "ray[serve]>=2.60", "torch==2.13.*", "packaging>=23", "packaging>=24.2"]
    found = ["onnx==1.20", "ray[serve]==2.60", "torch==2.13.*", "packaging==24.2"]
    assert lowest([Requirement(text) for text in texts]) == found
    with pytest.raises(ValueError, match="no lower bound"):
        lowest([Requirement("rich")])


def test_the_groups_are_extras() -> None:
    for group in GROUPS.values():
        assert set(group.extras) <= set(PROJECT["optional-dependencies"])
