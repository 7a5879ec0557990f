"""Keeping a verdict: its report as JSON and HTML, and its place in the bundle's manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsvl_export.parity_check.report.document import make_document
from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json, write_text
from runtimes.bundle.locks import manifest_file, manifest_lock, refuse_link
from runtimes.bundle.manifest import JUDGED_WITH, Manifest
from runtimes.errors import UserError

REPORTS = "reports"


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
        page = folder / f"{name}.html"
        try:
            from dsvl_export.parity_check.report.html import render
        except ImportError:
            page.unlink(missing_ok=True)  # of an earlier verdict
            return file
        write_text(page, render(document, images))
        return page
    except OSError as error:
        raise UserError(f"The report cannot be written to {folder}: {error.strerror}.") from error


def record_verdict(bundle: Bundle, result: ParityResult) -> Path:
    """Write the report into the bundle and its verdict into the manifest; returns the report's file.

    A verdict that could not be reached here does not replace one that was reached elsewhere.

    Raises:
        UserError: the bundle's files have changed since it was opened for judging.
    """
    refuse_link(bundle.folder, REPORTS)
    with manifest_lock(bundle.folder):
        return _record(bundle, result)


def _record(bundle: Bundle, result: ParityResult) -> Path:
    """Do it, while nobody else changes the manifest."""
    pair = f"{result.backend}/{result.precision}"
    # Read anew: the bundle may have been extended while parity ran.
    file = manifest_file(bundle.folder)
    now = Manifest.from_dict(read_json(file), str(file))
    judged = {
        path: entry
        for path, entry in bundle.manifest.files.items()
        if path.startswith((f"{pair}/", *JUDGED_WITH))
    }
    if any(now.files.get(path) != entry for path, entry in judged.items()):
        raise UserError(f"The bundle {bundle.folder} has changed while it was judged; run parity again.")
    name = f"parity-{result.backend}-{result.precision}"
    report = write_report(bundle, result, bundle.folder / REPORTS, name, bundle.folder / "goldens/images")
    if result.verdict == "not judged" and pair in now.parity:
        return report
    verdict = {
        "verdict": result.verdict,
        "execution": str(result.execution),
        "tolerances": "overridden" if result.overridden else "shipped",
        "goldens": result.goldens,
        "report": f"{REPORTS}/{name}.json",
    }
    write_json(file, replace(now, parity={**now.parity, pair: verdict}).to_dict())
    return report
