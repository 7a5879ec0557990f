"""Export: checkpoint → traced components → artifacts → bundle, stage by stage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from calibration.precision import PrecisionPlan
from calibration.quantized import trace_planned
from calibration.table import ScaleTable
from calibration.weights import QuantizedWeights
from dsvl_export.assembling import TOKEN_EMBEDDING, finished_artifacts, manifest_of, plan_hashes
from dsvl_export.calibrating import SAMPLES, CalibrationOptions, calibrate
from dsvl_export.compilers import (
    App,
    Compiled,
    CompileOptions,
    CompileProgram,
    Compiler,
    Parts,
    check_options,
    load_compiler,
)
from dsvl_export.ladder.noise import measure_noise, noise_file
from dsvl_export.ladder.stages import Goldens
from dsvl_export.planner.targets import find_target
from dsvl_export.precisions import (
    check_plan,
    check_target,
    plan_for,
    planned_weights,
    precision_folder,
)
from dsvl_export.staging import Staging
from dsvl_export.units import size
from dsvl_export.version import __version__
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.goldens import goldens_bytes, record_reference
from reference.session import write_token_embedding
from reference.specs import preprocess_spec, prompt_spec
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS, TracedComponent, component_contract
from runtimes.bundle import Artifact, Bundle
from runtimes.errors import UserError
from runtimes.files import write_json
from runtimes.tokenizer import PromptSpec

MAX_DEFAULT_CAPACITY = 2048


@dataclass(frozen=True)
class ExportProgress:
    """What an export reports: the stage, and how far it is (units of the stage's own choosing)."""

    stage: str
    done: int = 0
    total: int = 1
    state: Literal["running", "finished", "reused"] = "running"
    in_bytes: bool = False


Report = Callable[[ExportProgress], None]


def _silent(progress: ExportProgress) -> None:
    pass


def export(
    checkpoint: str | Path,
    output: str | Path,
    backend: str = "onnxruntime",
    precisions: Sequence[str] = ("fp32",),
    goldens: bool = True,
    report: Report = _silent,
    scales: str | Path | None = None,
    target: str | None = None,
    tensorrt: str | None = None,
    capacity: int | None = None,
    capabilities: Sequence[int] = (),
    deployment: str | None = None,
    delegate: str | None = None,
    prefill: bool = True,
) -> Bundle:
    """Export a checkpoint into a bundle, or add to a bundle of the same checkpoint.

    An interrupted export goes on where it stopped; a stage is redone only when its inputs changed.

    Args:
        checkpoint: ``tiny``, a folder or a hub id.
        output: the bundle's folder: new, empty, an unfinished export, or a bundle to extend.
        precisions: names, recipes, or YAML files of precision plans; each becomes a set of artifacts.
        goldens: record the reference's outputs, which ``parity`` compares with.
        scales: a scale table made by ``calibrate``; without one, precisions that need scales are calibrated
            on the bundled pictures.
        target: a device of ``targets``: what it cannot run is refused before any work.
        tensorrt: version of TensorRT that will build; None takes the target's.
        capacity: tokens of the KV cache that an engine is built for, and the bundle's default.
        capabilities: compute capabilities, as in 89, that TensorRT-RTX builds for.
        deployment: the oldest Apple system to run on, as in ``iOS18``.
        delegate: what ExecuTorch runs the encoders on: ``xnnpack``, ``coreml`` or ``vulkan``.
        prefill: whether ONNX Runtime gets a second decoder for prompts, with weights of 8 bits, where the
            first has 4 bits and rounds activations token by token.

    Raises:
        UserError: bad checkpoint, backend, precision or output folder, or a full disk.
    """
    compiler = load_compiler(backend)
    plans = [plan_for(compiler, precision) for precision in precisions]
    for one, other in combinations(plans, 2):
        if one.name == other.name and one != other:
            raise UserError(f"Two precision plans are called {one.name!r}; rename one of the files.")
    source = open_checkpoint(str(checkpoint))
    longest = source.config.decoder.max_positions
    if capacity is not None and not 1 <= capacity <= longest:
        raise UserError(f"The capacity must lie between 1 and the model's {longest}, got {capacity}.")
    usual = min(longest, MAX_DEFAULT_CAPACITY)
    device = find_target(target) if target else None
    for plan in plans:
        check_plan(backend, compiler, plan, source.config)
        if device:
            check_target(device, backend, plan, source.config)
    options = CompileOptions(
        device,
        capacity or usual,
        tensorrt,
        tuple(capabilities),
        deployment,
        delegate=delegate,
        prefill=prefill,
    )
    check_options(backend, compiler, options)
    compiler.settings(options)
    if check := getattr(compiler, "check", None):
        for plan in plans:
            check(plan, source.config, options)
    table = ScaleTable.load(Path(scales).expanduser()) if scales else None
    if table:
        for plan in plans:
            QuantizedWeights(source, plan, table).check()
    specs = (preprocess_spec(source), prompt_spec(source))
    staging = Staging(Path(output).expanduser())
    try:
        staging.open()
        _check_same_checkpoint(staging, source)
        options = replace(options, preprocessing=specs[0])
        if capacity is None and staging.previous:  # of the bundle that is extended
            options = replace(options, capacity=staging.previous.default_capacity)
        run = _Run(source, staging, report, compiler, options)
        run.check_disk(backend, plans, goldens)
        run.tokenizer()
        run.token_embedding()
        if goldens:
            run.goldens()
        for plan in plans:
            if plan.name not in PRECISION_DTYPES:
                run.precision(plan, table)
            run.program(backend, plan, specs[1])
        run.noise()
        staging.finish(manifest_of(source, staging, options.capacity, *specs))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"The export stopped: {reason} ({staging.folder});"
            " mend that and run it again, it goes on where it stopped."
        ) from error
    finally:
        staging.close()
    return Bundle.open(staging.folder)


def _check_same_checkpoint(staging: Staging, source: Checkpoint) -> None:
    known = [result["checkpoint"] for result in staging.results() if "checkpoint" in result]
    if staging.previous:
        known.append(staging.previous.checkpoint["sha256"])
    if any(digest != source.digest for digest in known):
        raise UserError(f"{staging.folder} holds a bundle of another checkpoint; give another folder.")


class _Run:
    """The stages of one export."""

    def __init__(
        self,
        source: Checkpoint,
        staging: Staging,
        report: Report,
        compiler: Compiler,
        options: CompileOptions,
    ) -> None:
        self.source, self.staging, self.report = source, staging, report
        self.compiler, self.options = compiler, options
        self._inputs = {"checkpoint": source.digest, "version": __version__}
        self._scales: ScaleTable | None = None
        self._traced: dict[tuple[str, str], tuple[TracedComponent, int]] = {}

    def check_disk(self, backend: str, plans: Sequence[PrecisionPlan], goldens: bool) -> None:
        """Refuse what the disk cannot hold, before any work; what is finished already is not counted.

        Raises:
            UserError: with both figures.
        """
        needed = 0 if self.staging.holds("token_embedding") else self.source.embedding_bytes() or 0
        if goldens and not self.staging.holds("goldens"):
            needed += goldens_bytes(self.source.config)
        for plan in plans:
            for component in TRACED_COMPONENTS:
                stages = (f"{backend}/{plan.name}/{part}" for part in (component, "program"))
                if not any(map(self.staging.holds, stages)):
                    self.report(ExportProgress(f"sizes of {plan.name}"))
                    needed += self._trace(component, plan)[1]
            self.report(ExportProgress(f"sizes of {plan.name}", 1, 1, "finished"))
        free = shutil.disk_usage(self.staging.folder).free
        if needed > free:
            raise UserError(
                f"The export takes {size(needed)} in {self.staging.folder}, {size(free)} are free there."
            )

    def _trace(self, component: str, plan: PrecisionPlan) -> tuple[TracedComponent, int]:
        """A component's program, and the bytes of its artifact."""
        key = (component, plan.name)
        if key not in self._traced:
            traced = trace_planned(self.source.config, component, plan)
            self._traced[key] = (traced, self.compiler.artifact_bytes(traced, self.options))
        return self._traced[key]

    def _stage(
        self,
        name: str,
        build: Callable[[Path], dict[str, Any]],
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Run a stage whose result follows from the checkpoint, this release, and ``more``."""
        self.report(ExportProgress(name))
        reused = self.staging.stage(name, {**self._inputs, **more}, build)
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
        def build(folder: Path) -> dict[str, Any]:
            record_reference(
                self.source,
                self.staging.folder / TOKEN_EMBEDDING,
                folder,
                lambda done, total: self.report(ExportProgress("goldens", done, total)),
            )
            return {"reference": "torch fp32", "torch": torch.__version__}

        self._stage("goldens", build)

    def noise(self) -> None:
        """What each precision of the bundle costs the reference itself on the recorded goldens."""
        hashes = {
            path: entry.sha256 for path, entry in self.staging.files().items() if path.startswith("goldens/")
        }
        for precision in dict.fromkeys(item.precision for item in finished_artifacts(self.staging)):
            if hashes and precision != "fp32":
                self._noise_of(precision, hashes)

    def precision(self, plan: PrecisionPlan, table: ScaleTable | None) -> None:
        """Keep a quantized precision's plan and scales in the bundle; calibrate where there are none."""
        name = precision_folder(plan.name)

        def build(folder: Path) -> dict[str, Any]:
            plan.save(folder / f"{plan.name}.yaml")
            found = table
            if found is None and plan.needs_scales(self.source.config):
                found = self._calibrated(name)
            if found:
                found.save(folder)
            return {}

        given = table.digest if table else None
        self._stage(name, build, {"plan": plan.to_dict(), "scales": given})

    def _calibrated(self, stage: str) -> ScaleTable:
        """Scales from the bundled pictures, made once for all precisions of this export."""
        if self._scales is None:
            with tempfile.TemporaryDirectory() as statistics:
                self._scales = calibrate(
                    self.source,
                    Path(statistics),
                    CalibrationOptions(samples=SAMPLES, rows=0),
                    on_step=lambda _, done, total: self.report(ExportProgress(stage, done, total)),
                ).table
        return self._scales

    def weights(self, precision: str) -> QuantizedWeights:
        """Parameters of a precision that the bundle holds."""
        return planned_weights(self.source, self.staging.folder, precision)

    def _rests_on(self, precision: str) -> dict[str, str]:
        return plan_hashes(self.staging, precision)

    def _noise_of(self, precision: str, goldens: dict[str, str]) -> None:
        def build(folder: Path) -> dict[str, Any]:
            noise = measure_noise(
                self.weights(precision),
                self.staging.folder / TOKEN_EMBEDDING,
                Goldens.recorded_into(self.staging.folder / "goldens"),
                lambda done, total: self.report(ExportProgress(name, done, total)),
            )
            write_json(folder / file, noise)
            return {}

        name, _, file = noise_file(precision).rpartition("/")
        self._stage(name, build, {"goldens": goldens, **self._rests_on(precision)})

    def program(self, backend: str, plan: PrecisionPlan, prompt: PromptSpec) -> None:
        """All components, in one file where the backend has it so, and the listing for apps."""
        assert self.options.preprocessing
        contracts = {
            component: component_contract(self.source.config, component, plan.base, plan.kv_cache)
            for component in TRACED_COMPONENTS
        }
        app = App(
            contracts, self.options.preprocessing, prompt, self.staging.folder / TOKEN_EMBEDDING,
            self.options.capacity, self.source.folder.name, plan.name,
        )  # fmt: skip
        whole = getattr(self.compiler, "compile_program", None)
        if whole:
            self._compiled(
                f"{backend}/{plan.name}/program", backend, plan, TRACED_COMPONENTS, partial(whole, app)
            )
        else:
            for component in TRACED_COMPONENTS:
                self._compiled(
                    f"{backend}/{plan.name}/{component}", backend, plan, (component,), self._one(component)
                )
        write = getattr(self.compiler, "write_listing", None)
        if write:

            def build(folder: Path) -> dict[str, Any]:
                write(folder, app)
                return {}

            self._stage(f"{backend}/{plan.name}/listing", build, {"capacity": self.options.capacity})

    def _one(self, component: str) -> CompileProgram:
        """The compiler's work on one component in the form of its work on all of them."""

        def compile_one(
            parts: Parts, folder: Path, on_bytes: Callable[[int], None], options: CompileOptions
        ) -> Compiled:
            return self.compiler.compile_component(*parts[component], folder, on_bytes, options)

        return compile_one

    def _compiled(
        self, name: str, backend: str, plan: PrecisionPlan, components: Sequence[str], work: CompileProgram
    ) -> None:
        """Trace, lower and check components in one stage; weights stream from the checkpoint."""

        def build(folder: Path) -> dict[str, Any]:
            weights = self.weights(plan.name)

            def loading(component: str) -> Callable[[str], torch.Tensor]:
                return lambda parameter: weights.load(f"{component}.{parameter}")

            traced = {component: self._trace(component, plan) for component in components}
            parts: Parts = {name: (program, loading(name)) for name, (program, _) in traced.items()}
            total, done = sum(count for _, count in traced.values()), 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                self.report(ExportProgress(name, min(done, total), max(total, 1), in_bytes=True))

            compiled = work(parts, folder, on_bytes, self.options)
            engine = compiled.engine
            artifacts = [
                Artifact(
                    component, backend, plan.name, compiled.target, compiled.dialect,
                    tuple(f"{name}/{file.relative_to(folder).as_posix()}" for file in compiled.files),
                    {**compiled.tools, "torch": torch.__version__, "dsvl-export": __version__},
                    replace(engine, file=f"{name}/{engine.file}") if engine else None,
                    plan.base, compiled.capacity,
                )
                for component in components
            ]  # fmt: skip
            return {"artifacts": list(map(asdict, artifacts)), "rests_on": self._rests_on(plan.name)}

        self._stage(name, build, {**self._rests_on(plan.name), **self.compiler.settings(self.options)})
