"""The configs that a bundle keeps: one for each backend and precision, to export it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsvl_export.compilers.precisions import precision_folder
from dsvl_export.exporter.adapters import parse_named
from dsvl_export.exporter.config import ComponentChoices, ExportConfig, is_plan_file
from dsvl_export.exporter.job import ExportJob, Part, Variant
from dsvl_export.exporter.manifest import config_folder
from reference.checkpoint.lora_adapter import AdapterChoice, parse_adapters
from reference.trace import PRECISION_DTYPES
from runtimes.bundle.mixes import Mix

CONFIG_FILE = "export.yaml"
TO_BUNDLE = "../../.."  # from a config's folder


def write_configs(job: ExportJob, compiled: Sequence[Variant]) -> None:
    """Write the config of each variant of an export.

    The file is ``configs/<backend>/<precision>/export.yaml``, or ``configs/mixed/<name>/`` for a
    mix. A later export of the same variant replaces it; exports of others leave it alone.

    Args:
        job: the export.
        compiled: its variants whose artifacts are current; the others get no config.
    """
    for variant in compiled:
        config = bundled_config(job, variant)
        stage = config_folder(variant.backend, variant.precision)
        job.staging.stage(stage, config.to_dict(), partial(_write_config, config, variant.mix))


def bundled_config(job: ExportJob, variant: Variant) -> ExportConfig:
    """Return the config that makes one variant of a bundle again.

    It names the bundle's copies of plans and of given scales, and has the capacity that was used.
    Folders of the checkpoint and of adapters are absolute.
    """
    folders = {part.plan.name: f"{TO_BUNDLE}/{precision_folder(part.plan.name)}" for part in variant.parts}
    quantized = [folder for name, folder in folders.items() if name not in PRECISION_DTYPES]

    def named(part: Part) -> str:
        plan = part.plan.name
        return f"{folders[plan]}/{plan}.yaml" if is_plan_file(part.precision) else part.precision

    chosen = {name: f"{part.backend}:{named(part)}" for part in variant.parts for name in part.components}
    return replace(
        job.config,
        checkpoint=_absolute(job.config.checkpoint),
        adapters=tuple(str(_absolute_choice(choice)) for choice in parse_adapters(job.config.adapters)),
        switchable_adapters=tuple(
            str(replace(named, choice=_absolute_choice(named.choice)))
            for named in parse_named(job.config.switchable_adapters)
        ),
        backend=None if variant.mix else variant.backend,
        precisions=() if variant.mix else tuple(map(named, variant.parts)),
        components=ComponentChoices(**chosen) if variant.mix else ComponentChoices(),
        scales=quantized[0] if job.scales and quantized else None,
        capacity=job.options.capacity,
    )


def _absolute_choice(choice: AdapterChoice) -> AdapterChoice:
    """Return an adapter with the absolute path of its folder."""
    return replace(choice, folder=Path(_absolute(str(choice.folder))))


def _absolute(name: str) -> str:
    """Return a folder as an absolute path; ``tiny`` and hub ids stay as they are."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if name != "tiny" and folder.is_dir() else name


def _write_config(config: ExportConfig, mix: Mix | None, folder: Path) -> dict[str, Any]:
    config.save(folder / CONFIG_FILE)
    return {"mix": asdict(mix)} if mix else {}
