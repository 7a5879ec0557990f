"""The oracles compare all families in every run."""

from __future__ import annotations

import pytest

from tests.conftest import OraclePair


@pytest.fixture(scope="session", params=["siglip", "hybrid", "janus"])
def pair(request: pytest.FixtureRequest) -> OraclePair:
    return request.getfixturevalue(f"{request.param}_pair")
