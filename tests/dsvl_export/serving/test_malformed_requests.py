"""Some hundred of the malformed requests that ``benchmarks/robustness/http_requests.py`` sends by the thousand."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from tests.dsvl_export.serving.server import Served

SCRIPT = Path(__file__).parents[3] / "benchmarks/robustness/http_requests.py"


def test_malformed_requests(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Each is answered in the form of the protocol, none with 500; nothing fails inside."""
    spec = importlib.util.spec_from_file_location("http_requests", SCRIPT)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look it up
    spec.loader.exec_module(script)
    seen = asyncio.run(script.attack(served.url, 600, 7, lambda: 0.0))
    assert seen.faults == []
    assert sum(seen.statuses.values()) == 600
    assert {"json: 400", "image: 400", "image: 200", "bytes: 400"} <= set(seen.statuses)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    served.rests()
