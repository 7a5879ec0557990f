"""Export: checkpoint → traced components → artifacts → bundle, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from dsvl_export.compilers.precisions import check_mix, check_request
from dsvl_export.compilers.registry import check_options
from dsvl_export.exporter.adapters import (
    NamedAdapter,
    parse_named,
    refuse_backend,
    refuse_similar_name,
)
from dsvl_export.exporter.artifact_stages import ArtifactStages
from dsvl_export.exporter.bundled_config import write_configs
from dsvl_export.exporter.config import AUTO, ComponentChoices, ExportConfig
from dsvl_export.exporter.job import ExportJob, Variant, identify
from dsvl_export.exporter.manifest import build_manifest, earlier_variants
from dsvl_export.exporter.overflow import check_ranges, overflow_remedy
from dsvl_export.exporter.reference_stages import ReferenceStages
from dsvl_export.exporter.stages import ExportProgress, Report, Stage, StageRunner
from dsvl_export.exporter.staging import Staging
from dsvl_export.exporter.variants import list_variants
from dsvl_export.targets.options import (
    CompileOptions,
    ExecuTorchOptions,
    OnnxRuntimeOptions,
    TensorRTOptions,
)
from reference.checkpoint.chat_template import wants_built_in
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.checkpoint.lora_adapter import parse_adapters
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.model.config import ModelConfig
from runtimes.bundle.bundle import Bundle
from runtimes.errors import PrecisionOverflowError, UserError

MAX_DEFAULT_CAPACITY = 2048


def _silent(progress: ExportProgress) -> None:
    pass


def export(
    checkpoint: str | Path,
    output: str | Path,
    backend: str | None = None,
    precisions: Sequence[str] = (),
    goldens: bool = True,
    report: Report = _silent,
    scales: str | Path | None = None,
    target: str | None = None,
    tensorrt: str | None = None,
    capacity: int | None = None,
    capabilities: Sequence[int] = (),
    delegate: str | None = None,
    prefill: bool = True,
    adapters: Sequence[str] = (),
    switchable: bool | None = None,
    switchable_adapters: Sequence[str] = (),
    chat_template: str | None = None,
    components: Mapping[str, str] | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle, or add to a bundle of the same checkpoint.

    This is ``export_bundle`` with the config's values as arguments.

    Args:
        checkpoint: ``tiny``, a checkpoint folder, or a hub id.
        output: the bundle's folder: new, empty, an unfinished export, or a bundle to extend.
        backend: see ``ExportConfig``, as all that follow.
        precisions: names, recipes, or YAML files of precision plans.
        goldens: record the reference's outputs, and compare the written files with the checkpoint.
        report: is called with progress.
        scales: folder of a scale table.
        target: a device of ``targets``.
        tensorrt: version of TensorRT that builds the engines.
        capacity: tokens of the KV cache.
        capabilities: compute capabilities that TensorRT-RTX builds engines for.
        delegate: what ExecuTorch runs the encoders on.
        prefill: add ONNX Runtime's second decoder for prompts.
        adapters: LoRA adapters to merge, each ``FOLDER`` or ``FOLDER=WEIGHT``.
        switchable: add a decoder for adapters that are switched at run time.
        switchable_adapters: such adapters, each ``NAME=FOLDER`` or ``NAME=FOLDER=WEIGHT``.
        chat_template: ``checkpoint`` or ``built-in``.
        components: component → ``BACKEND:PRECISION``, for a mix.

    Raises:
        UserError: bad checkpoint, backend, precision or output folder, or a full disk.
        PrecisionOverflowError: weights or activations exceed the range of a precision's base.
    """
    config = ExportConfig(
        checkpoint=str(checkpoint),
        adapters=tuple(adapters),
        switchable_adapters=tuple(switchable_adapters),
        chat_template=chat_template,
        backend=backend,
        precisions=tuple(precisions),
        components=ComponentChoices.from_dict(components or {}),
        target=target,
        capacity=capacity,
        scales=str(scales) if scales else None,
        goldens=goldens,
        onnxruntime=OnnxRuntimeOptions(prefill, switchable),
        tensorrt=TensorRTOptions(tensorrt, tuple(capabilities)),
        executorch=ExecuTorchOptions(delegate),
    )
    return export_bundle(config, output, report)


def export_bundle(config: ExportConfig, output: str | Path, report: Report = _silent) -> Bundle:
    """Export what a config describes into a bundle, or add it to a bundle of the same checkpoint.

    An interrupted export resumes where it stopped; a stage runs again only if its inputs changed.

    Args:
        config: what to export.
        output: the bundle's folder: new, empty, an unfinished export, or a bundle to extend.
        report: is called with progress.

    Raises:
        UserError: bad checkpoint, backend, precision or output folder, or a full disk.
        PrecisionOverflowError: weights or activations exceed the range of a precision's base.
    """
    if config.backend == AUTO:
        from dsvl_export.exporter.fastest import export_fastest  # which exports by this function

        return export_fastest(config, output, report).bundle
    config = config.with_defaults()
    variants = list_variants(config)
    source = open_checkpoint(
        config.checkpoint,
        adapters=parse_adapters(config.adapters),
        built_in_prompt=wants_built_in(config.chat_template),
    )
    longest = source.config.decoder.max_positions
    if config.capacity is not None and not 1 <= config.capacity <= longest:
        raise UserError(f"The capacity must lie between 1 and the model's {longest}, got {config.capacity}.")
    options = config.compile_options(capacity=min(longest, MAX_DEFAULT_CAPACITY))
    if options.onnxruntime.switchable:
        for variant in variants:
            refuse_backend(variant.decoder.backend)
    switchable = [
        NamedAdapter.open(named, source.config) for named in parse_named(config.switchable_adapters)
    ]
    for adapter in switchable:
        for plan in (variant.decoder.plan for variant in variants):
            adapter.check_range(source.config, Path(output).expanduser(), plan.name, plan.base)
    _check_variants(variants, source.config, options)
    scales = ScaleTable.load(Path(config.scales).expanduser()) if config.scales else None
    if scales:
        identify(source, report)
        for part in (part for variant in variants for part in variant.parts):
            QuantizedWeights(source, part.plan, scales).check()
    prompt = prompt_spec(source)
    options = replace(options, preprocessing=preprocess_spec(source))
    staging = Staging(Path(output).expanduser())
    try:
        staging.open()
        _check_same_checkpoint(staging, source, report)
        for adapter in switchable:
            kept = staging.previous.adapters if staging.previous else ()
            refuse_similar_name(adapter.name, [item.name for item in kept])
        if config.capacity is None and staging.previous:
            options = replace(options, capacity=staging.previous.default_capacity)
        job = ExportJob(config, source, variants, options, scales, prompt, staging, report, tuple(switchable))
        _run(job)
    except (OSError, SafetensorError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "there is no memory left"
        raise UserError(
            f"The export stopped: {reason} ({staging.folder});"
            " fix this and run the same command again; the export resumes."
        ) from error
    finally:
        staging.close()
    return Bundle.open(staging.folder)


def _check_variants(variants: Sequence[Variant], config: ModelConfig, options: CompileOptions) -> None:
    """Refuse what a backend or its target does not support, before any work.

    Raises:
        UserError: names the closest alternative.
    """
    parts = [part for variant in variants for part in variant.parts]
    compilers = {part.backend: part.compiler for part in parts}
    check_options(compilers, options)
    for backend, compiler in compilers.items():
        plans = [part.plan for part in parts if part.backend == backend]
        check_request(backend, compiler, plans, config, options)
    for variant in variants:
        if variant.mix:
            check_mix(variant.mix, variant.plans, config)


def _run(job: ExportJob) -> None:
    """Run the stages and write the manifest.

    If a precision overflows, an extended bundle stays usable without it.
    """
    runner, artifacts = StageRunner(job.staging, job.report), ArtifactStages(job)
    stages = _list_stages(job, artifacts)
    try:
        runner.make_room(stages)
        identify(job.source, job.report)
        compiled = _compiled_variants(job, runner, artifacts)
        check_ranges(job, [variant for variant in job.variants if variant not in compiled])
        runner.run(stages)
    except PrecisionOverflowError:
        if job.staging.previous:
            _finish(job, _compiled_variants(job, runner, artifacts))
        raise
    _finish(job, job.variants)


def _compiled_variants(job: ExportJob, runner: StageRunner, artifacts: ArtifactStages) -> list[Variant]:
    """Return the variants whose artifacts are current."""
    return [
        variant
        for variant in job.variants
        if all(map(runner.is_current, _artifact_stages(variant, artifacts)))
    ]


def _artifact_stages(variant: Variant, artifacts: ArtifactStages) -> list[Stage]:
    return [stage for part in variant.parts for stage in artifacts.artifacts(part)]


def _list_stages(job: ExportJob, artifacts: ArtifactStages) -> list[Stage]:
    """Return all stages of an export in their order."""
    reference = ReferenceStages(job)
    stages = [reference.tokenizer(), reference.token_embedding()]
    if job.config.goldens:
        stages.append(reference.goldens())
    if job.has_goldens:
        stages.append(reference.long_golden())
    for variant in job.variants:
        for part in variant.parts:
            stages += artifacts.precision(part.plan)
        if job.has_goldens:
            remedy = overflow_remedy(variant)
            stages += reference.quantization_errors(variant.precision, variant.precisions, remedy)
        stages += _artifact_stages(variant, artifacts)
        plan = variant.decoder.plan
        stages += [
            adapter.stage(job.staging, job.source.config, variant.decoder.backend, plan.name, plan.base)
            for adapter in job.switchable
        ]
        stages += artifacts.listing(variant)
    if job.has_goldens:
        exported = {variant.precision for variant in job.variants}
        for name, precisions in earlier_variants(job.staging).items():
            if name not in exported:
                stages += reference.quantization_errors(name, precisions, remedy="", optional=True)
        stages += [reference.prefix(precision) for precision in job.decoder_precisions()]
        stages += reference.layers(job.precisions())
    return stages


def _finish(job: ExportJob, compiled: Sequence[Variant]) -> None:
    """Write the manifest, and the configs of the variants whose artifacts are current."""
    write_configs(job, compiled)
    capacity, preprocessing = job.options.capacity, job.options.preprocessing
    job.staging.finish(
        lambda now: build_manifest(job.source, job.staging, capacity, preprocessing, job.prompt, now)
    )


def _check_same_checkpoint(staging: Staging, source: Checkpoint, report: Report) -> None:
    """Check that a bundle to extend is of the checkpoint.

    Raises:
        UserError: it is of another one.
    """
    digests = [result["checkpoint"] for result in staging.results() if "checkpoint" in result]
    if staging.previous:
        digests.append(staging.previous.checkpoint["sha256"])
    if digests and set(digests) != {identify(source, report)}:
        raise UserError(
            f"{staging.folder} holds a bundle of another checkpoint than {source.label}, of other adapters,"
            " or of dsvl-export 0.4, which did not hash generation_config.json; pass another folder."
        )
