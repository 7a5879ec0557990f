"""Deletes backends and precisions from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsvl_export.compilers.precisions import precision_folder
from dsvl_export.exporter.manifest import ADAPTERS, config_folder
from dsvl_export.exporter.staging import Staging
from dsvl_export.parity_check.layers import outputs_file
from dsvl_export.parity_check.long_context import planned_file
from dsvl_export.parity_check.quantization_error import quantization_error_file
from dsvl_export.parity_check.report.record import REPORTS, report_name
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Manifest, list_choices
from runtimes.bundle.mixes import Pair
from runtimes.errors import UserError
from runtimes.prefix import prefix_file


def drop_choices(folder: Path, pairs: Sequence[Pair]) -> Bundle:
    """Delete backends and precisions, and what the bundle recorded for them alone.

    Artifacts that a mix uses stay.

    Args:
        folder: of the bundle.
        pairs: backends and precisions.

    Returns:
        The smaller bundle.

    Raises:
        UserError: the folder is not a bundle, nothing would be left of it, or another export writes
            to it.
    """
    staging = Staging(folder)
    try:
        staging.open()
        manifest = staging.bundle().manifest
        smaller = _without(manifest, pairs)
        if not list_choices(smaller.artifacts, smaller.mixes):
            raise UserError(f"Nothing would be left of the bundle {folder}; delete the folder instead.")
        for stage in _unused_stages(manifest, smaller):
            staging.forget(stage)
        staging.finish(lambda now: _without(now or manifest, pairs))
        for pair in pairs:
            for file in (folder / REPORTS).glob(f"{report_name(*pair)}.*"):
                file.unlink()
    finally:
        staging.close()
    return Bundle.open(folder)


def _without(manifest: Manifest, pairs: Sequence[Pair]) -> Manifest:
    """Return a manifest without backends and precisions."""
    used = {(name, *pair) for mix in manifest.mixes for name, pair in mix.components.items()}
    artifacts = tuple(
        item
        for item in manifest.artifacts
        if (item.backend, item.precision) not in pairs
        or (item.component, item.backend, item.precision) in used
    )
    decoders = {(item.backend, item.precision) for item in artifacts if item.component == "decoder"}
    choices = {"/".join(pair) for pair in list_choices(artifacts, manifest.mixes)}
    smaller = replace(
        manifest,
        artifacts=artifacts,
        adapters=tuple(item for item in manifest.adapters if (item.backend, item.precision) in decoders),
        parity={pair: verdict for pair, verdict in manifest.parity.items() if pair in choices},
    )
    precisions = {item.precision for item in artifacts}
    unused = tuple(f"{stage}/" for stage in _unused_stages(manifest, smaller))
    return replace(
        smaller,
        contracts={name: table for name, table in manifest.contracts.items() if name in precisions},
        files={path: entry for path, entry in manifest.files.items() if not path.startswith(unused)},
    )


def _unused_stages(manifest: Manifest, smaller: Manifest) -> set[str]:
    """Return the stages of a manifest that a smaller one does not need."""
    return _stages(manifest) - _stages(smaller)


def _stages(manifest: Manifest) -> set[str]:
    """Return the stages that depend on what a bundle can run."""
    choices = list_choices(manifest.artifacts, manifest.mixes)
    stages = {item.stage for item in manifest.artifacts}
    stages |= {f"{ADAPTERS}/{item.backend}/{item.precision}/{item.name}" for item in manifest.adapters}
    for backend, precision in choices:
        stages |= {f"{backend}/{precision}/listing", config_folder(backend, precision)}
        stages.add(_folder(quantization_error_file(precision)))
    for item in manifest.artifacts:
        stages |= {precision_folder(item.precision), _folder(outputs_file(item.precision))}
        if item.component == "decoder":
            stages.add(_folder(planned_file(item.precision)))
            stages.add(_folder(prefix_file(item.precision)))
    return stages


def _folder(file: str) -> str:
    """Return the stage that a file of the bundle belongs to."""
    return file.rpartition("/")[0]
