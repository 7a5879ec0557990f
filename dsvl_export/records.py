"""Keeping a verdict: its report as JSON and HTML, and its place in the bundle's manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsvl_export.ladder.result import ParityResult
from dsvl_export.report.document import make_document
from runtimes.bundle import MANIFEST, Bundle
from runtimes.errors import UserError
from runtimes.files import write_json, write_text


def write_report(bundle: Bundle, result: ParityResult, folder: Path, name: str, images: Path) -> Path:
    """Write ``<name>.json`` and, where what it needs is installed, ``<name>.html``.

    Args:
        images: folder of the goldens' images, to show them.

    Returns:
        The page, or the JSON where jinja2 and matplotlib (the extra ``report``) are missing.

    Raises:
        UserError: the folder cannot be written.
    """
    document = make_document(bundle, result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.json"
        write_json(file, document)
        try:
            from dsvl_export.report.html import render
        except ImportError:
            return file
        page = folder / f"{name}.html"
        write_text(page, render(document, images))
        return page
    except OSError as error:
        raise UserError(f"The report cannot be written to {folder}: {error.strerror}.") from error


def record_verdict(bundle: Bundle, result: ParityResult) -> Path:
    """Write the report into the bundle and its verdict into the manifest; returns the report's file."""
    name = f"parity-{result.backend}-{result.precision}"
    report = write_report(bundle, result, bundle.folder / "reports", name, bundle.folder / "goldens/images")
    verdict = {
        "verdict": result.verdict,
        "execution": str(result.execution),
        "goldens": result.goldens,
        "report": f"reports/{name}.json",
    }
    # Read anew: the bundle may have been extended while parity ran.
    bundle = Bundle.open(bundle.folder)
    parity = {**bundle.manifest.parity, f"{result.backend}/{result.precision}": verdict}
    write_json(bundle.folder / MANIFEST, replace(bundle.manifest, parity=parity).to_dict())
    return report
