"""What the stages of one export share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from calibration.precision_plan import PrecisionPlan
from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from dsvl_export.compilers.precisions import planned_weights
from dsvl_export.compilers.protocol import Compiler
from dsvl_export.exporter.adapters import NamedAdapter
from dsvl_export.exporter.config import ExportConfig
from dsvl_export.exporter.manifest import finished_artifacts, plan_hashes
from dsvl_export.exporter.stages import ExportProgress, Report
from dsvl_export.exporter.staging import Staging
from dsvl_export.targets.options import CompileOptions
from dsvl_export.version import __version__, code_digest
from reference.checkpoint.checkpoint import Checkpoint
from runtimes.bundle.files import sha256_of_text
from runtimes.bundle.mixes import COMPONENTS, Mix
from runtimes.text.tokenizer import PromptSpec


@dataclass(frozen=True)
class Part:
    """Components that an export compiles for one backend with one precision plan.

    Args:
        backend: name of the backend.
        compiler: of the backend.
        plan: the precision plan.
        precision: the plan as the export's config names it.
        components: what is compiled; all components, but for a mix.
    """

    backend: str
    compiler: Compiler
    plan: PrecisionPlan
    precision: str
    components: tuple[str, ...] = COMPONENTS


@dataclass(frozen=True)
class Variant:
    """What an export adds to a bundle: a backend and precision, or a mix.

    Args:
        backend: name of the backend, or ``mixed``.
        precision: name of the precision plan, or of the mix.
        parts: what is compiled.
        mix: of its components, if it is one.
    """

    backend: str
    precision: str
    parts: tuple[Part, ...]
    mix: Mix | None = None

    @property
    def plans(self) -> dict[str, PrecisionPlan]:
        """The precision plan of each component."""
        return {component: part.plan for part in self.parts for component in part.components}

    @property
    def precisions(self) -> dict[str, str]:
        """The name of each component's precision."""
        return {component: plan.name for component, plan in self.plans.items()}

    @property
    def decoder(self) -> Part:
        """The part that has the decoder."""
        return next(part for part in self.parts if "decoder" in part.components)


@dataclass(frozen=True)
class ExportJob:
    """One export: what was asked for, and where it is written.

    Args:
        config: with the backend, precisions and capacity that it is run with.
        source: the checkpoint.
        variants: what the export adds to the bundle.
        options: for the compilers.
        scales: the given scale table.
        prompt: the checkpoint's prompt format.
        staging: the output folder.
        report: is called with progress.
        switchable: adapters that the bundle keeps beside the weights.
    """

    config: ExportConfig
    source: Checkpoint
    variants: tuple[Variant, ...]
    options: CompileOptions
    scales: ScaleTable | None
    prompt: PromptSpec
    staging: Staging
    report: Report
    switchable: tuple[NamedAdapter, ...] = ()

    @property
    def has_goldens(self) -> bool:
        """Whether the bundle has goldens, or this export records them."""
        return self.config.goldens or self.staging.result("goldens") is not None

    def inputs(self, code: tuple[str, ...]) -> dict[str, Any]:
        """Return what every stage depends on.

        Args:
            code: one of the lists of ``stage_code``.
        """
        checkpoint = identify(self.source, self.report)
        prompt = sha256_of_text(json.dumps(self.prompt.settings(), sort_keys=True))
        return {
            "checkpoint": checkpoint,
            "prompt": prompt,
            "version": __version__,
            "code": code_digest(code),
        }

    def plan_inputs(self, precision: str) -> dict[str, str]:
        """Return the hashes of a precision's plan and scales in the bundle."""
        return plan_hashes(self.staging, precision)

    def weights(self, precision: str) -> QuantizedWeights:
        """Return the parameters in a precision that the bundle holds."""
        return planned_weights(self.source, self.staging.folder, precision)

    def precisions(self) -> list[str]:
        """Return the precisions that the bundle has after this export, earlier ones first."""
        earlier = (artifact.precision for artifact in finished_artifacts(self.staging))
        new = (part.plan.name for variant in self.variants for part in variant.parts)
        return list(dict.fromkeys([*earlier, *new]))

    def decoder_precisions(self) -> list[str]:
        """Return the precisions of the decoders that the bundle has after this export."""
        items = finished_artifacts(self.staging)
        earlier = (artifact.precision for artifact in items if artifact.component == "decoder")
        return list(dict.fromkeys([*earlier, *(variant.decoder.plan.name for variant in self.variants)]))


def identify(source: Checkpoint, report: Report) -> str:
    """Hash the checkpoint, once, and return its SHA-256."""

    def on_step(done: int, total: int) -> None:
        state: Literal["running", "finished"] = "finished" if done == total else "running"
        report(ExportProgress("hash of the checkpoint", done, total, state, in_bytes=True))

    return source.compute_digest(on_step)
