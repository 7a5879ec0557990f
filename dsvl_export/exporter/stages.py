"""The stages of an export, each made from the checkpoint and what came before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from calibration.precision_plan import PrecisionPlan
from calibration.quantized_program import trace_with_plan
from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from calibration.statistics import STATISTICS_FILE, Statistics
from dsvl_export.audit import audit_written
from dsvl_export.compilers.precisions import (
    planned_weights,
    precision_folder,
)
from dsvl_export.compilers.protocol import (
    App,
    Compiler,
    CompilesProgram,
    Parts,
    WritesListing,
    compile_parts,
    describe_app,
)
from dsvl_export.exporter.manifest import TOKEN_EMBEDDING, checkpoint_name, finished_artifacts, plan_hashes
from dsvl_export.exporter.overflow import check_weights, overflow_remedy
from dsvl_export.exporter.staging import Staging
from dsvl_export.parity_check.layers import INPUTS as LAYER_INPUTS
from dsvl_export.parity_check.layers import outputs_file, record_inputs, record_outputs
from dsvl_export.parity_check.long_context import planned_file
from dsvl_export.parity_check.quantization_error import (
    measure_long_golden,
    measure_quantization_error,
    quantization_error_file,
)
from dsvl_export.parity_check.stages import Goldens
from dsvl_export.planning.workload import Workload, activation_growth
from dsvl_export.quantization.calibrate import SAMPLES, CalibrationOptions, calibrate
from dsvl_export.targets.options import CompileOptions
from dsvl_export.version import __version__, code_digest
from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.specs import reference_settings
from reference.goldens.layers import layer_golden_bytes
from reference.goldens.record import (
    goldens_bytes,
    long_golden_bytes,
    record_reference_goldens,
    record_reference_long_golden,
)
from reference.session import write_token_embedding
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS, TracedComponent
from runtimes.bundle.files import JOURNAL, sha256_of_file, write_json, write_text
from runtimes.bundle.manifest import TOKENIZER, Artifact
from runtimes.errors import PrecisionOverflowError, UserError
from runtimes.goldens.golden import SETTINGS
from runtimes.goldens.long_context import LONG_GOLDEN, LongGolden
from runtimes.text.tokenizer import PromptSpec
from runtimes.units import size as size_of

CALIBRATION = "calibration"  # where an export without scales keeps what it finds


@dataclass(frozen=True)
class ExportProgress:
    """What an export reports: the stage, and how far it is (units of the stage's own choosing)."""

    stage: str
    done: int = 0
    total: int = 1
    state: Literal["running", "finished", "reused"] = "running"
    in_bytes: bool = False


Report = Callable[[ExportProgress], None]


def identify(source: Checkpoint, report: Report) -> str:
    """Hash the checkpoint, once."""

    def on_step(done: int, total: int) -> None:
        state: Literal["running", "finished"] = "finished" if done == total else "running"
        report(ExportProgress("hash of the checkpoint", done, total, state, in_bytes=True))

    return source.compute_digest(on_step)


class ExportStages:
    """The stages of one export.

    Args:
        table: the scale table that was given.
        audits: read artifacts back and compare them with the checkpoint, which takes as long as writing.
    """

    def __init__(
        self,
        source: Checkpoint,
        staging: Staging,
        report: Report,
        backend: str,
        compiler: Compiler,
        options: CompileOptions,
        table: ScaleTable | None,
        audits: bool,
    ) -> None:
        self.source, self.staging, self.report = source, staging, report
        self.backend, self.compiler, self.options = backend, compiler, options
        self.table, self.audits = table, audits
        self._scales: ScaleTable | None = None
        self._bytes: dict[tuple[str, str], int] = {}
        self._written = 0  # bytes of the stage that runs, before they are hashed

    @property
    def _inputs(self) -> dict[str, Any]:
        """What every stage rests on."""
        checkpoint = identify(self.source, self.report)
        return {"checkpoint": checkpoint, "version": __version__, "code": code_digest()}

    def make_room(self, plans: Sequence[PrecisionPlan], goldens: bool) -> None:
        """Drop what was interrupted of other stages, and refuse what the disk cannot hold, before any work.

        What is finished already, or was written before an interruption, is not counted.

        Raises:
            UserError: with both figures.
        """
        stages = [(plan, stage) for plan in plans for stage in self._stages(plan).items()]
        judged = {*(plan.name for plan in plans), *self._exported()}
        names = {*(name for _, (name, _) in stages), *map(_noise_stage, judged), _folder(LAYER_INPUTS)}
        names |= set(map(_long_stage, judged))
        names |= {_folder(outputs_file(name)) for name in judged}
        self.staging.forget_all_but({"token_embedding", "goldens", CALIBRATION, *names})
        config = self.source.config
        sizes: list[tuple[str, Callable[[], Any] | None, Callable[[], int]]] = [
            ("token_embedding", lambda: self._inputs, lambda: self.source.embedding_bytes() or 0)
        ]
        if goldens:
            capacity = self.options.capacity
            sizes.append(
                (
                    "goldens",
                    lambda: self._inputs,
                    lambda: goldens_bytes(config) + long_golden_bytes(config, capacity),
                )
            )
            handed, given = layer_golden_bytes(config)
            sizes.append((_folder(LAYER_INPUTS), self._layer_inputs, lambda: handed))
            sizes += [
                (_folder(outputs_file(plan.name)), partial(self._layer_inputs, plan.name), lambda: given)
                for plan in plans
                if plan.name != "fp32"
            ]
        for plan, (name, components) in stages:
            inputs = partial(self._inputs_of, plan) if self._is_current(plan) else None
            sizes.append((name, inputs, partial(self._size, plan, components)))
        needed = taken = 0  # old files stay until the new ones are there
        for stage in sizes:
            new, old = self.staging.left(*stage)
            needed, taken = max(needed, taken + new), taken + new - old
        free = shutil.disk_usage(self.staging.folder).free
        if needed > free:
            raise UserError(
                f"The export takes {size_of(needed)} in {self.staging.folder},"
                f" {size_of(free)} are free there."
            )

    def check_weights(self, plans: Sequence[PrecisionPlan]) -> None:
        """Refuse weights that a precision cannot hold, before any work; what is compiled was checked before.

        Raises:
            PrecisionOverflowError: names the tensor.
            UserError: the checkpoint holds NaN or infinity.
        """
        ranges: dict[str, PrecisionPlan] = {}  # plans of one base round the same numbers
        for plan in plans:
            stages = self._stages(plan)
            inputs = self._inputs_of(plan) if self._is_current(plan) else None
            if inputs is None or not all(self.staging.is_current(stage, inputs) for stage in stages):
                ranges.setdefault(plan.base, plan)
        for base, plan in ranges.items():
            weights = QuantizedWeights(self.source, PrecisionPlan(plan.name, base))
            name = f"range of {base}"
            self.report(ExportProgress(name))
            check_weights(weights, self._remedy(plan))
            self.report(ExportProgress(name, 1, 1, "finished"))

    def _remedy(self, plan: PrecisionPlan) -> str:
        return overflow_remedy(self.backend, self.compiler, plan)

    def _stages(self, plan: PrecisionPlan) -> dict[str, tuple[str, ...]]:
        """Stages that compile, and their components: all in one where the backend has them in one file."""
        folder = f"{self.backend}/{plan.name}"
        if isinstance(self.compiler, CompilesProgram):
            return {f"{folder}/program": TRACED_COMPONENTS}
        return {f"{folder}/{component}": (component,) for component in TRACED_COMPONENTS}

    def _size(self, plan: PrecisionPlan, components: Sequence[str]) -> int:
        """Bytes of the artifacts of components."""
        name = f"sizes of {plan.name}"
        self.report(ExportProgress(name))
        for component in components:
            if (component, plan.name) not in self._bytes:
                traced = self._traced(component, plan)
                self._bytes[component, plan.name] = self.compiler.artifact_bytes(traced, self.options)
        self.report(ExportProgress(name, 1, 1, "finished"))
        return sum(self._bytes[component, plan.name] for component in components)

    def _exported(self) -> list[str]:
        """Precisions that the bundle has."""
        return list(dict.fromkeys(item.precision for item in finished_artifacts(self.staging)))

    def _is_current(self, plan: PrecisionPlan) -> bool:
        """Whether a precision's plan and scales lie in the bundle as this export has them."""
        return plan.name in PRECISION_DTYPES or self.staging.is_current(
            precision_folder(plan.name), self._inputs_of_precision(plan)
        )

    def _inputs_of(self, plan: PrecisionPlan) -> dict[str, Any]:
        """What a compiled stage rests on."""
        return {**self._inputs, **self._rests_on(plan.name), **self.compiler.settings(self.options)}

    def _inputs_of_precision(self, plan: PrecisionPlan) -> dict[str, Any]:
        return {
            **self._inputs,
            "plan": plan.to_dict(),
            "scales": self.table.digest if self.table else None,
        }

    def _traced(self, component: str, plan: PrecisionPlan) -> TracedComponent:
        return trace_with_plan(self.source.config, component, plan)

    def _stage(
        self, name: str, build: Callable[[Path], dict[str, Any]], inputs: Mapping[str, Any] | None = None
    ) -> None:
        """Run a stage; without ``inputs``, its result follows from the checkpoint and this release."""
        self._written = 0

        def on_hashed(done: int, total: int) -> None:
            written = self._written
            self.report(ExportProgress(name, written + done, max(written + total, 1), in_bytes=True))

        self.report(ExportProgress(name))
        reused = self.staging.stage(name, inputs or self._inputs, build, on_hashed)
        self.report(ExportProgress(name, 1, 1, "reused" if reused else "finished"))

    def tokenizer(self) -> None:
        def build(folder: Path) -> dict[str, Any]:
            for file in self.source.tokenizer_files:
                shutil.copyfile(file, folder / file.name)
            return {"checkpoint": self.source.digest}

        self._stage("tokenizer", build)

    def token_embedding(self) -> None:
        def build(folder: Path) -> dict[str, Any]:
            write_token_embedding(self.source, folder / Path(TOKEN_EMBEDDING).name)
            return {}

        self._stage("token_embedding", build)

    def goldens(self) -> None:
        def on_saved(file: Path) -> None:
            write_text(file.with_name(file.name + JOURNAL), sha256_of_file(file))

        def build(folder: Path) -> dict[str, Any]:
            for journal in folder.glob(f"*{JOURNAL}"):
                file = journal.with_name(journal.name.removesuffix(JOURNAL))
                if not file.exists() or sha256_of_file(file) != journal.read_text():
                    file.unlink(missing_ok=True)
            record_reference_goldens(
                self.source,
                self.staging.folder / TOKEN_EMBEDDING,
                folder,
                lambda done, total: self.report(ExportProgress("goldens", done, total)),
                on_saved,
            )
            table = {TOKEN_EMBEDDING: asdict(self.staging.files()[TOKEN_EMBEDDING])}
            write_json(folder / SETTINGS, reference_settings(self.source) | {"files": table})
            return {"reference": "torch fp32", "torch": torch.__version__}

        self._stage("goldens", build)

    def long_golden(self) -> None:
        """Record the text that fills the KV cache, where there are goldens and none of this capacity."""
        name, key = f"goldens/{LONG_GOLDEN}", {"long_golden": self.options.capacity}
        known = self.staging.result("goldens")
        if known is None:
            return
        if name in self.staging.files() and known.items() >= key.items():
            return
        self.report(ExportProgress("long golden"))
        table = self.staging.folder / TOKEN_EMBEDDING
        made = record_reference_long_golden(self.source, table, self.options.capacity)
        file = self.staging.work / LONG_GOLDEN
        made.save(file)
        self.staging.attach("goldens", file, {**known, **key})
        self.report(ExportProgress("long golden", 1, 1, "finished"))

    def noise(self, plan: PrecisionPlan) -> None:
        """What a precision costs the reference itself on the recorded goldens, if there are any.

        Raises:
            PrecisionOverflowError: it computes NaN or infinity.
        """
        if self._hashes and plan.name != "fp32":
            self._noise_of(plan.name, self._remedy(plan))

    def noise_of_others(self, plans: Sequence[PrecisionPlan]) -> None:
        """As ``noise``, for the precisions that earlier exports made.

        One that overflows has no noise, and ``parity`` finds the NaN or infinity in its artifacts.
        """
        for precision in self._exported():
            if self._hashes and precision != "fp32" and precision not in {plan.name for plan in plans}:
                try:
                    self._noise_of(precision, "")
                except PrecisionOverflowError:
                    for name in (_noise_stage(precision), _long_stage(precision)):
                        if not self.staging.is_current(name, self._measured_with(name, precision)):
                            self.staging.forget(name)  # it is of other goldens
                        self.report(ExportProgress(name, 1, 1, "finished"))

    @property
    def _hashes(self) -> dict[str, str]:
        """Of the goldens but the long one, which follows the capacity."""
        return {
            path: entry.sha256
            for path, entry in self.staging.files().items()
            if path.startswith("goldens/") and path != f"goldens/{LONG_GOLDEN}"
        }

    def _measured_with(self, stage: str, precision: str) -> dict[str, Any]:
        """What the noise of a precision rests on, or what its plan computes for the long golden."""
        long = self.staging.files().get(f"goldens/{LONG_GOLDEN}")
        of_long = {"golden": long.sha256 if long else None}
        goldens = of_long if stage == _long_stage(precision) else {"goldens": self._hashes}
        return {**self._inputs, **goldens, **self._rests_on(precision)}

    def layers(self) -> None:
        """What each layer of the bundle's precisions gives on recorded inputs."""
        golden = self._first_golden
        if golden is None:
            return
        table = self.staging.folder / TOKEN_EMBEDDING

        def build_inputs(folder: Path) -> dict[str, Any]:
            record_inputs(self.source, table, self.staging.folder / golden, folder / Path(LAYER_INPUTS).name)
            return {}

        self._stage(_folder(LAYER_INPUTS), build_inputs, self._layer_inputs())
        for precision in self._exported():
            if precision != "fp32":
                self._layers_of(precision)

    @property
    def _first_golden(self) -> str | None:
        """Its path in the bundle."""
        files = sorted(path for path in self.staging.files() if path.startswith("goldens/"))
        return next((path for path in files if path.endswith(".safetensors")), None)

    def _layer_inputs(self, precision: str | None = None) -> dict[str, Any]:
        """What layer goldens rest on: the inputs, or the outputs of a precision."""
        golden = self._first_golden
        digest = self.staging.files()[golden].sha256 if golden else None
        return {**self._inputs, "golden": digest, **(self._rests_on(precision) if precision else {})}

    def _layers_of(self, precision: str) -> None:
        file = outputs_file(precision)

        def build(folder: Path) -> dict[str, Any]:
            given = self.staging.folder / LAYER_INPUTS
            record_outputs(self.weights(precision), given, folder / Path(file).name)
            return {}

        self._stage(_folder(file), build, self._layer_inputs(precision))

    def precision(self, plan: PrecisionPlan) -> None:
        """Keep a quantized precision's plan and scales in the bundle; calibrate where there are none."""
        name = precision_folder(plan.name)

        def build(folder: Path) -> dict[str, Any]:
            plan.save(folder / f"{plan.name}.yaml")
            found = self.table
            if found is None and plan.needs_scales(self.source.config):
                found = self._calibrated(name)
            if found:
                found.save(folder)
            return {}

        self._stage(name, build, self._inputs_of_precision(plan))

    def _calibrated(self, stage: str) -> ScaleTable:
        """Scales from the bundled pictures, made once for all precisions of this export.

        What they rest on is kept until the bundle is finished, so that an interruption loses little.
        """
        if self._scales is None:
            folder = self.staging.scratch(CALIBRATION, self._inputs)
            file = folder / STATISTICS_FILE
            try:
                Statistics.load(file)
            except UserError:  # none, or torn ones
                file.unlink(missing_ok=True)
            self._scales = calibrate(
                self.source,
                folder,
                CalibrationOptions(samples=SAMPLES, rows=0),
                on_step=lambda _, done, total: self.report(ExportProgress(stage, done, total)),
            ).table
        return self._scales

    def weights(self, precision: str) -> QuantizedWeights:
        """Parameters of a precision that the bundle holds."""
        return planned_weights(self.source, self.staging.folder, precision)

    def _rests_on(self, precision: str) -> dict[str, str]:
        return plan_hashes(self.staging, precision)

    def _noise_of(self, precision: str, remedy: str) -> None:
        table = self.staging.folder / TOKEN_EMBEDDING

        def build(folder: Path) -> dict[str, Any]:
            noise = measure_quantization_error(
                self.weights(precision),
                table,
                Goldens.recorded_into(self.staging.folder / "goldens"),
                lambda done, total: self.report(ExportProgress(name, done, total)),
                folder / f"noise{JOURNAL}",
                remedy,
            )
            write_json(folder / file, noise)
            return {}

        def build_long(folder: Path) -> dict[str, Any]:
            exact = LongGolden.load(self.staging.folder / "goldens" / LONG_GOLDEN)
            measure_long_golden(self.weights(precision), table, exact, remedy).save(folder / LONG_GOLDEN)
            return {}

        name, file = _noise_stage(precision), Path(quantization_error_file(precision)).name
        self._stage(name, build, self._measured_with(name, precision))
        long = _long_stage(precision)
        self._stage(long, build_long, self._measured_with(long, precision))

    def program(self, plan: PrecisionPlan, prompt: PromptSpec) -> None:
        """All components, and the listing for apps."""
        assert self.options.preprocessing
        folder = self.staging.folder
        app = describe_app(
            self.source.config, plan, self.options.preprocessing, prompt, folder / TOKEN_EMBEDDING,
            folder / TOKENIZER, self.options.capacity, checkpoint_name(self.source, self.staging),
        )  # fmt: skip
        for name, components in self._stages(plan).items():
            self._compiled(name, plan, components, app)
        compiler = self.compiler
        if isinstance(compiler, WritesListing):

            def build(folder: Path) -> dict[str, Any]:
                compiler.write_listing(folder, app)
                return {}

            inputs = {**self._inputs, "capacity": self.options.capacity}
            self._stage(f"{self.backend}/{plan.name}/listing", build, inputs)

    def _compiled(self, name: str, plan: PrecisionPlan, components: Sequence[str], app: App) -> None:
        """Trace, lower and check components in one stage; weights stream from the checkpoint.

        Progress counts each byte twice, as it is written and as it is hashed.
        """

        def build(folder: Path) -> dict[str, Any]:
            weights = self.weights(plan.name)

            def loading(component: str) -> Callable[[str], torch.Tensor]:
                return lambda parameter: weights.load(f"{component}.{parameter}")

            traced = {component: self._traced(component, plan) for component in components}
            parts: Parts = {name: (program, loading(name)) for name, program in traced.items()}
            total = self._size(plan, components)

            def on_bytes(count: int) -> None:
                self._written = min(self._written + count, total)
                self.report(ExportProgress(name, self._written, max(2 * total, 1), in_bytes=True))

            def active(component: str) -> tuple[int, int]:
                longest = self.source.config.decoder.max_positions
                return activation_growth(Workload(traced[component]), self.backend, longest)

            compiled = compile_parts(self.compiler, app, parts, folder, on_bytes, self.options)
            audited = self.audits and audit_written(self.compiler, name, compiled, parts, self.options)
            engine = compiled.engine
            artifacts = [
                Artifact(
                    component, self.backend, plan.name, compiled.target, compiled.dialect,
                    tuple(f"{name}/{file.relative_to(folder).as_posix()}" for file in compiled.files),
                    {**compiled.tools, "torch": torch.__version__, "dsvl-export": __version__},
                    replace(engine, file=f"{name}/{engine.file}") if engine else None,
                    plan.base, compiled.capacity,
                    *active(component),
                    plan.quantizes_inputs_or_cache,
                )
                for component in components
            ]  # fmt: skip
            return {
                "artifacts": list(map(asdict, artifacts)),
                "rests_on": self._rests_on(plan.name),
                "audited": audited,
            }

        self._stage(name, build, self._inputs_of(plan))


def _noise_stage(precision: str) -> str:
    return _folder(quantization_error_file(precision))


def _long_stage(precision: str) -> str:
    return _folder(planned_file(precision))


def _folder(file: str) -> str:
    return file.rpartition("/")[0]
