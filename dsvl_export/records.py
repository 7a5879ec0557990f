"""Keeping a parity verdict: in the bundle's ``reports/`` and in its manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsvl_export.ladder import ParityResult
from runtimes.bundle import MANIFEST, Bundle
from runtimes.files import write_json


def record_verdict(bundle: Bundle, result: ParityResult) -> Path:
    """Write the report and put its verdict into the manifest; returns the report's file."""
    reports = bundle.folder / "reports"
    reports.mkdir(exist_ok=True)
    file = reports / f"parity-{result.backend}-{result.precision}.json"
    write_json(file, result.to_dict())
    verdict = {
        "verdict": result.to_dict()["verdict"],
        "goldens": result.goldens,
        "report": f"reports/{file.name}",
    }
    # Read anew: the bundle may have been extended while parity ran.
    bundle = Bundle.open(bundle.folder)
    parity = {**bundle.manifest.parity, f"{result.backend}/{result.precision}": verdict}
    write_json(bundle.folder / MANIFEST, replace(bundle.manifest, parity=parity).to_dict())
    return file
