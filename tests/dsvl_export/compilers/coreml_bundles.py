"""The bundle that the tests of Core ML share, and copies of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from dsvl_export.exporter.export import export
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import write_json
from runtimes.bundle.manifest import MANIFEST
from tests.conftest import programs_untouched

PRECISIONS = ("fp16", "int8", "int8-weights", "int4", "palette4")


def export_all_precisions(folder: Path) -> None:
    """Export tiny in every precision that Core ML has."""
    with programs_untouched(open_checkpoint("tiny").config, "coreml", PRECISIONS):
        export("tiny", folder, "coreml", PRECISIONS, capacity=1024)


def copy_with_goldens(bundle: Bundle, folder: Path, count: int) -> Path:
    """A copy of a bundle with its first goldens and without the long one, which takes the interpreter long."""
    shutil.copytree(bundle.folder, folder)
    goldens = [
        path for path in bundle.manifest.files if path.startswith("goldens/") and path.endswith("tensors")
    ]
    left_out = sorted(goldens)[count:]
    files = {path: entry for path, entry in bundle.manifest.files.items() if path not in left_out}
    write_json(folder / MANIFEST, replace(bundle.manifest, files=files).to_dict())
    return folder


def package(bundle: Bundle, precision: str, component: str) -> Path:
    """The folder of a component's package."""
    artifact = bundle.artifact(component, "coreml", precision)
    return bundle.path(artifact.files[0]).parents[2]
