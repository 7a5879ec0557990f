"""Stages that a compiler runs: plans and scales, artifacts, and the listing for apps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calibration.precision_plan import PrecisionPlan
from calibration.quantized_program import trace_with_plan
from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from calibration.statistics import STATISTICS_FILE, Statistics
from dsvl_export.audit import audit_written
from dsvl_export.compilers.precisions import precision_folder
from dsvl_export.compilers.protocol import (
    App,
    CompilesProgram,
    NeedsScratch,
    Parts,
    WritesListing,
    compile_parts,
    describe_app,
)
from dsvl_export.exporter import stage_code
from dsvl_export.exporter.job import ExportJob, Part, Variant
from dsvl_export.exporter.manifest import TOKEN_EMBEDDING, checkpoint_name
from dsvl_export.exporter.stages import CALIBRATION, ExportProgress, Stage, StageProgress
from dsvl_export.planning.workload import Workload, activation_growth
from dsvl_export.quantization.calibrate import SAMPLES, CalibrationOptions, calibrate
from dsvl_export.version import __version__
from reference.trace import PRECISION_DTYPES, TracedComponent
from runtimes.bundle.manifest import TOKENIZER, Artifact
from runtimes.errors import UserError


class ArtifactStages:
    """Makes the stages of one export that depend on its backends and precisions."""

    def __init__(self, job: ExportJob) -> None:
        """Make stages for a job whose output folder is open."""
        self._job = job
        self._calibrated: ScaleTable | None = None
        # Bytes of artifacts by backend, precision and component.
        self._bytes: dict[tuple[str, str, str], int] = {}

    # Plans and scales.

    def precision(self, plan: PrecisionPlan) -> list[Stage]:
        """Return the stage of a precision's plan and scales; float precisions have none."""
        if plan.name in PRECISION_DTYPES:
            return []
        name = precision_folder(plan.name)
        return [Stage(name, partial(self._precision_inputs, plan), partial(self._write_precision, plan))]

    def _precision_inputs(self, plan: PrecisionPlan) -> dict[str, Any]:
        scales = self._job.scales.digest if self._job.scales else None
        return {**self._job.inputs(stage_code.CALIBRATION), "plan": plan.to_dict(), "scales": scales}

    def _write_precision(self, plan: PrecisionPlan, folder: Path, progress: StageProgress) -> dict[str, Any]:
        plan.save(folder / f"{plan.name}.yaml")
        table = self._job.scales
        if table is None and plan.needs_scales(self._job.source.config):
            table = self._calibrate(progress)
        if table:
            table.save(folder)
        return {}

    def _calibrate(self, progress: StageProgress) -> ScaleTable:
        """Return scales from the bundled images, calibrated once for all precisions of this export.

        The statistics are kept until the bundle is finished, so that an interruption loses little.
        """
        if self._calibrated is None:
            inputs = self._job.inputs(stage_code.CALIBRATION)
            folder = self._job.staging.scratch(CALIBRATION, inputs)
            file = folder / STATISTICS_FILE
            try:
                Statistics.load(file)
            except UserError:  # missing or incomplete
                file.unlink(missing_ok=True)
            self._calibrated = calibrate(
                self._job.source,
                folder,
                CalibrationOptions(samples=SAMPLES, rows=0),
                on_step=lambda _, done, total: progress.step(done, total),
            ).table
        return self._calibrated

    # Artifacts.

    def artifacts(self, part: Part) -> list[Stage]:
        """Return the stages that compile: one for each component, or one if they share a file."""
        folder = f"{part.backend}/{part.plan.name}"
        stages: dict[str, tuple[str, ...]] = {f"{folder}/{name}": (name,) for name in part.components}
        if isinstance(part.compiler, CompilesProgram):
            stages = {f"{folder}/program": part.components}
        return [
            Stage(
                name,
                partial(self._artifact_inputs, part),
                partial(self._compile, name, part, components),
                bytes=partial(self._artifact_bytes, part, components),
                scratch=partial(self._scratch_bytes, part, components),
            )
            for name, components in stages.items()
        ]

    def _artifact_inputs(self, part: Part) -> dict[str, Any] | None:
        """Return what artifacts depend on; None until the bundle has this plan and its scales."""
        if not all(
            self._job.staging.is_current(stage.name, stage.inputs()) for stage in self.precision(part.plan)
        ):
            return None
        return {
            **self._job.inputs(stage_code.ARTIFACTS),
            **self._job.plan_inputs(part.plan.name),
            **part.compiler.settings(self._job.options),
            **({"audited": True} if self._job.config.goldens else {}),
        }

    def _artifact_bytes(self, part: Part, components: Sequence[str]) -> int:
        """Return the bytes of the artifacts of components, from shapes alone."""
        name = f"sizes of {part.plan.name}"
        self._job.report(ExportProgress(name))
        keys = {component: (part.backend, part.plan.name, component) for component in components}
        for component, key in keys.items():
            if key not in self._bytes:
                traced = self._trace(component, part.plan)
                self._bytes[key] = part.compiler.artifact_bytes(traced, self._job.options)
        self._job.report(ExportProgress(name, 1, 1, "finished"))
        return sum(self._bytes[key] for key in keys.values())

    def _scratch_bytes(self, part: Part, components: Sequence[str]) -> int:
        """Return the bytes of files that are on the disk while artifacts are compiled."""
        if not isinstance(part.compiler, NeedsScratch):
            return 0
        return part.compiler.scratch_bytes(self._artifact_bytes(part, components))

    def _trace(self, component: str, plan: PrecisionPlan) -> TracedComponent:
        return trace_with_plan(self._job.source.config, component, plan)

    def _compile(
        self,
        name: str,
        part: Part,
        components: Sequence[str],
        folder: Path,
        progress: StageProgress,
    ) -> dict[str, Any]:
        """Trace, lower and check components; their weights stream from the checkpoint."""
        job, plan = self._job, part.plan
        weights = job.weights(plan.name)
        parts: Parts = {
            component: (self._trace(component, plan), partial(_load_parameter, weights, component))
            for component in components
        }
        total = self._artifact_bytes(part, components)
        compiled = compile_parts(
            part.compiler,
            self._app(plan),
            parts,
            folder,
            lambda count: progress.write(count, total),
            job.options,
        )
        audited = job.config.goldens and audit_written(part.compiler, name, compiled, parts, job.options)
        engine = compiled.engine
        longest = job.source.config.decoder.max_positions
        artifacts = [
            Artifact(
                component=component,
                backend=part.backend,
                precision=plan.name,
                target=compiled.target,
                dialect=compiled.dialect,
                files=tuple(f"{name}/{file.relative_to(folder).as_posix()}" for file in compiled.files),
                tools={**compiled.tools, "torch": torch.__version__, "dsvl-export": __version__},
                engine=replace(engine, file=f"{name}/{engine.file}") if engine else None,
                base=plan.base,
                capacity=compiled.capacity,
                activation_bytes=activation_bytes,
                activation_bytes_per_token=bytes_per_token,
                quantizes_activations=plan.quantizes_inputs_or_cache,
            )
            for component, (traced, _) in parts.items()
            for activation_bytes, bytes_per_token in [
                activation_growth(Workload(traced), part.backend, longest)
            ]
        ]
        return {
            "artifacts": list(map(asdict, artifacts)),
            "depends_on": job.plan_inputs(plan.name),
            "audited": audited,
        }

    # Source code for apps.

    def listing(self, variant: Variant) -> list[Stage]:
        """Return the stage that writes source code for apps, if the compiler has any.

        A mix has none.
        """
        part = variant.decoder
        if variant.mix or not isinstance(part.compiler, WritesListing):
            return []
        name = f"{part.backend}/{part.plan.name}/listing"
        return [Stage(name, self._listing_inputs, partial(self._write_listing, part.plan, part.compiler))]

    def _listing_inputs(self) -> dict[str, Any]:
        return {**self._job.inputs(stage_code.ARTIFACTS), "capacity": self._job.options.capacity}

    def _write_listing(
        self, plan: PrecisionPlan, compiler: WritesListing, folder: Path, progress: StageProgress
    ) -> dict[str, Any]:
        compiler.write_listing(folder, self._app(plan))
        return {}

    def _app(self, plan: PrecisionPlan) -> App:
        """Describe the bundle to those who build an app on it."""
        job = self._job
        assert job.options.preprocessing
        folder = job.staging.folder
        return describe_app(
            config=job.source.config,
            plan=plan,
            preprocessing=job.options.preprocessing,
            prompt=job.prompt,
            embedding=folder / TOKEN_EMBEDDING,
            tokenizer=folder / TOKENIZER,
            capacity=job.options.capacity,
            model=checkpoint_name(job.source, job.staging),
        )


def _load_parameter(weights: QuantizedWeights, component: str, parameter: str) -> torch.Tensor:
    """Load a parameter of a component by its name in the traced program."""
    return weights.load(f"{component}.{parameter}")
