"""What this machine can compile and run, what is missing, and which known defects apply here."""

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
    """JSON-able: machine, packages, backends, version pairs that break, and defects of installed runtimes.

    ``healthy`` says that some backend runs here, and that no installed versions are known to break one.
    """
    versions = package_versions()
    names = sorted({*compiler_names(), *backend_names()})
    backends = {name: {"compile": _compile(name), "run": _run(name)} for name in names}
    usable = {name for name, found in backends.items() if found["compile"]["able"] or found["run"]["able"]}
    here = [defect for defect in load_defects() if defect.installed(versions)]
    broken = [defect for defect in here if defect.broken]
    harmful = [defect for defect in broken if set(defect.backends) & set(names)]
    return {
        "healthy": any(found["run"]["able"] for found in backends.values()) and not harmful,
        "machine": describe_machine(),
        "packages": versions,
        "backends": backends,
        "broken_pairs": [_row(defect) for defect in broken],
        "defects": [
            _row(defect)
            for defect in here
            if not defect.broken and (not defect.backends or set(defect.backends) & usable)
        ],
    }


def _compile(backend: str) -> dict[str, Any]:
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
    from dsvl_export.compilers.precisions import supported_precisions  # deferred: imports torch

    return {"able": True, "precisions": supported_precisions(compiler)}


def _run(backend: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"able": True, "devices": load_backend(backend).devices()}
    except UserError as error:
        return {"able": False, "missing": str(error)}
    if backend == "onnxruntime":
        listed = load_targets()["cpu"].backends[backend]
        found["release"] = onnxruntime.release()
        found["needs"] = {name: release_for_precision(name) for name in listed}
        found["too_old_for"] = [
            name for name, needed in found["needs"].items() if upgrade_message(needed, found["release"])
        ]
    return found


def _row(defect: Defect) -> dict[str, Any]:
    return {
        "id": defect.id,
        "what": defect.what,
        "do": defect.do,
        "handled": defect.handled,
        "link": defect.link,
    }
