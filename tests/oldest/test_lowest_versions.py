"""Every dependency has a lower bound, which the slow lane installs."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.oldest.lane import GROUPS, PROJECT, lowest, requirements


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_every_dependency_has_a_lower_bound(extra: str) -> None:
    for requirement in requirements((extra,)):
        assert "==" in lowest(requirement)


def test_the_lowest_version_of_a_requirement() -> None:
    assert lowest(Requirement("onnx>=1.20,<2")) == "onnx==1.20"
    assert lowest(Requirement("ray[serve]>=2.60")) == "ray[serve]==2.60"
    assert lowest(Requirement("torch==2.13.*")) == "torch==2.13.*"
    with pytest.raises(ValueError, match="no lower bound"):
        lowest(Requirement("rich"))


def test_the_groups_are_extras() -> None:
    for group in GROUPS.values():
        assert set(group.extras) <= set(PROJECT["optional-dependencies"])
