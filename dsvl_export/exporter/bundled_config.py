"""The configs that a bundle keeps: one for each backend and precision, to export it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from calibration.precision_plan import PrecisionPlan
from dsvl_export.compilers.precisions import precision_folder
from dsvl_export.exporter.adapters import parse_named
from dsvl_export.exporter.config import ExportConfig, is_plan_file
from dsvl_export.exporter.job import ExportJob
from dsvl_export.exporter.manifest import config_folder
from reference.checkpoint.lora_adapter import AdapterChoice, parse_adapters
from reference.trace import PRECISION_DTYPES

CONFIG_FILE = "export.yaml"
TO_BUNDLE = "../../.."  # from a config's folder


def write_configs(job: ExportJob, compiled: Sequence[PrecisionPlan]) -> None:
    """Write the config of each precision of an export.

    The file is ``configs/<backend>/<precision>/export.yaml``. A later export of the same backend
    and precision replaces it; exports of others leave it alone.

    Args:
        job: the export.
        compiled: its plans whose artifacts are current; the others get no config.
    """
    for plan, precision in zip(job.plans, job.config.precisions, strict=True):
        if plan in compiled:
            config = bundled_config(job, plan, precision)
            stage = config_folder(job.backend, plan.name)
            job.staging.stage(stage, config.to_dict(), partial(_write_config, config))


def bundled_config(job: ExportJob, plan: PrecisionPlan, precision: str) -> ExportConfig:
    """Return the config that makes one precision of a bundle again.

    It names the bundle's copies of a plan and of given scales, and has the capacity that was used.
    Folders of the checkpoint and of adapters are absolute.

    Args:
        job: the export.
        plan: the precision's.
        precision: as the export's config names it.
    """
    folder = f"{TO_BUNDLE}/{precision_folder(plan.name)}"
    given_scales = job.scales is not None and plan.name not in PRECISION_DTYPES
    return replace(
        job.config,
        checkpoint=_absolute(job.config.checkpoint),
        adapters=tuple(str(_absolute_choice(choice)) for choice in parse_adapters(job.config.adapters)),
        switchable_adapters=tuple(
            str(replace(named, choice=_absolute_choice(named.choice)))
            for named in parse_named(job.config.switchable_adapters)
        ),
        precisions=(f"{folder}/{plan.name}.yaml" if is_plan_file(precision) else precision,),
        scales=folder if given_scales else None,
        capacity=job.options.capacity,
    )


def _absolute_choice(choice: AdapterChoice) -> AdapterChoice:
    """Return an adapter with the absolute path of its folder."""
    return replace(choice, folder=Path(_absolute(str(choice.folder))))


def _absolute(name: str) -> str:
    """Return a folder as an absolute path; ``tiny`` and hub ids stay as they are."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if name != "tiny" and folder.is_dir() else name


def _write_config(config: ExportConfig, folder: Path) -> dict[str, Any]:
    config.save(folder / CONFIG_FILE)
    return {}
