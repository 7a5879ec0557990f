"""The diagnosis of this machine: what it can export and run, what is missing, known defects."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dsvl_export.compilers.registry import EXTRAS, compiler_names, load_compiler
from dsvl_export.targets.defects import Defect, load_defects
from dsvl_export.targets.machine import describe_machine, package_versions
from dsvl_export.targets.targets import load_targets
from runtimes.backends import onnxruntime
from runtimes.backends.onnxruntime_releases import release_for_precision, upgrade_message
from runtimes.backends.registry import backend_names, load_backend
from runtimes.errors import UserError


def diagnose() -> dict[str, Any]:
    """Return machine, packages, backends, incompatible versions and known defects, as JSON values.

    ``healthy`` says that at least one backend runs here, and that no backend has installed versions
    that are known to be incompatible.
    """
    versions = package_versions()
    names = sorted({*compiler_names(), *backend_names()})
    backends = {name: {"compile": _compile(name), "run": _run(name)} for name in names}
    usable = {name for name, row in backends.items() if row["compile"]["able"] or row["run"]["able"]}
    installed = [defect for defect in load_defects() if defect.installed(versions)]
    broken = [defect for defect in installed if defect.broken]
    harmful = [defect for defect in broken if set(defect.backends) & set(names)]
    return {
        "healthy": any(row["run"]["able"] for row in backends.values()) and not harmful,
        "machine": describe_machine(),
        "packages": versions,
        "backends": backends,
        "broken_pairs": [_row(defect) for defect in broken],
        "defects": [
            _row(defect)
            for defect in installed
            if not defect.broken and (not defect.backends or set(defect.backends) & usable)
        ],
    }


def _compile(backend: str) -> dict[str, Any]:
    """Return the precisions that a backend can be exported in here, or what is missing."""
    try:
        compiler = load_compiler(backend)
    except UserError as error:
        return {"able": False, "missing": str(error)}
    if find_spec("torch") is None:
        extras = EXTRAS.get(backend, "export")
        return {
            "able": False,
            "missing": f"Exporting needs torch; run: pip install 'dsvl-export[{extras}]'.",
        }
    from dsvl_export.compilers.precisions import supported_precisions  # imports torch

    return {"able": True, "precisions": supported_precisions(compiler)}


def _run(backend: str) -> dict[str, Any]:
    """Return the devices that a backend can run on here, or what is missing."""
    try:
        row: dict[str, Any] = {"able": True, "devices": load_backend(backend).devices()}
    except UserError as error:
        return {"able": False, "missing": str(error)}
    if backend == "onnxruntime":
        precisions = load_targets()["cpu"].backends[backend]
        row["release"] = onnxruntime.release()
        row["needs"] = {name: release_for_precision(name) for name in precisions}
        row["too_old_for"] = [
            name for name, needed in row["needs"].items() if upgrade_message(needed, row["release"])
        ]
    return row


def _row(defect: Defect) -> dict[str, Any]:
    return {
        "id": defect.id,
        "what": defect.what,
        "do": defect.do,
        "handled": defect.handled,
        "link": defect.link,
    }
