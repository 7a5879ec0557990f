"""Records a verdict: the report as JSON and HTML, and the verdict in the manifest of the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsvl_export.parity_check.report.document import make_document
from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json, write_text
from runtimes.bundle.locks import manifest_file, manifest_lock, refuse_link
from runtimes.bundle.manifest import Manifest
from runtimes.errors import UserError

REPORTS = "reports"


def write_report(bundle: Bundle, result: ParityResult, folder: Path, name: str, images: Path) -> Path:
    """Write ``<name>.json`` and, if jinja2 and matplotlib are installed, ``<name>.html``.

    Args:
        bundle: the bundle that was judged.
        result: the result to report.
        folder: folder of the report; it is created.
        name: name of the files without the ending.
        images: folder with the images of the goldens, which the page shows.

    Returns:
        The page, or the JSON file if jinja2 or matplotlib (the extra ``report``) is missing.

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
            # Deferred: imports jinja2 and matplotlib, which are optional.
            from dsvl_export.parity_check.report.html import render
        except ImportError:
            page.unlink(missing_ok=True)  # of an earlier verdict
            return file
        write_text(page, render(document, images))
        return page
    except OSError as error:
        raise UserError(f"The report cannot be written to {folder}: {error.strerror}.") from error


def report_name(backend: str, precision: str) -> str:
    """Return the name of the files of a report, without the ending."""
    return f"parity-{backend}-{precision}"


def record_verdict(bundle: Bundle, result: ParityResult) -> Path:
    """Write the report into the bundle and the verdict into its manifest; return the report's file.

    The verdict ``not judged`` does not replace a verdict of another machine.

    Raises:
        UserError: files of the bundle changed while it was judged.
    """
    refuse_link(bundle.folder, REPORTS)
    with manifest_lock(bundle.folder):
        return _record(bundle, result)


def _record(bundle: Bundle, result: ParityResult) -> Path:
    """Record a verdict; the caller holds the lock of the manifest."""
    pair = f"{result.backend}/{result.precision}"
    # The bundle may have been extended during the parity check.
    file = manifest_file(bundle.folder)
    current = Manifest.from_dict(read_json(file), str(file))
    judged = bundle.manifest.judged_files(result.backend, result.precision)
    if any(current.files.get(path) != entry for path, entry in judged.items()):
        raise UserError(f"The bundle {bundle.folder} has changed while it was judged; run parity again.")
    name = report_name(result.backend, result.precision)
    report = write_report(bundle, result, bundle.folder / REPORTS, name, bundle.folder / "goldens/images")
    if result.verdict == "not judged" and pair in current.parity:
        return report
    verdict = {
        "verdict": result.verdict,
        "execution": str(result.execution),
        "tolerances": "overridden" if result.overridden else "shipped",
        "goldens": result.goldens,
        "report": f"{REPORTS}/{name}.json",
    }
    write_json(file, replace(current, parity={**current.parity, pair: verdict}).to_dict())
    return report
