"""Export: checkpoint → traced components → artifacts → bundle, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from safetensors import SafetensorError

from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import ScaleTable
from dsvl_export.compilers.precisions import check_request, plan_for
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.exporter.manifest import manifest_of
from dsvl_export.exporter.stages import ExportProgress, ExportStages, Report, identify
from dsvl_export.exporter.staging import Staging
from dsvl_export.targets.options import CompileOptions
from dsvl_export.targets.targets import find_target
from reference.checkpoint.chat_template import describe_template_difference
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.trace import PRECISION_DTYPES
from runtimes.bundle.bundle import Bundle
from runtimes.errors import PrecisionOverflowError, UserError

MAX_DEFAULT_CAPACITY = 2048


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
        goldens: record the reference's outputs, which ``parity`` compares with, and audit what is written.
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
        PrecisionOverflowError: weights or activations exceed the range of a precision's base.
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
    options = CompileOptions(
        device,
        capacity or usual,
        tensorrt,
        tuple(capabilities),
        deployment,
        delegate=delegate,
        prefill=prefill,
    )
    check_request(backend, compiler, plans, source.config, options)
    table = ScaleTable.load(Path(scales).expanduser()) if scales else None
    if table:
        identify(source, report)
        for plan in plans:
            QuantizedWeights(source, plan, table).check()
    prompt = prompt_spec(source)
    prompt = replace(prompt, template_difference=describe_template_difference(source, prompt))
    specs = (preprocess_spec(source), prompt)
    staging = Staging(Path(output).expanduser())
    try:
        staging.open()
        _check_same_checkpoint(staging, source, report)
        options = replace(options, preprocessing=specs[0])
        if capacity is None and staging.previous:  # of the bundle that is extended
            options = replace(options, capacity=staging.previous.default_capacity)
        run = ExportStages(source, staging, report, backend, compiler, options, table, audits=goldens)
        run.make_room(plans, goldens)
        identify(source, report)
        run.check_weights(plans)
        run.tokenizer()
        run.token_embedding()
        if goldens:
            run.goldens()
        run.long_golden()
        for plan in plans:
            if plan.name not in PRECISION_DTYPES:
                run.precision(plan)
            run.noise(plan)
            run.program(plan, specs[1])
        run.noise_of_others(plans)
        run.layers()
        staging.finish(lambda now: manifest_of(source, staging, options.capacity, *specs, now))
    except PrecisionOverflowError:
        if staging.previous:  # the bundle stays usable without the precision
            staging.finish(lambda now: manifest_of(source, staging, options.capacity, *specs, now))
        raise
    except (OSError, SafetensorError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "there is no memory left"
        raise UserError(
            f"The export stopped: {reason} ({staging.folder});"
            " mend that and run it again, it goes on where it stopped."
        ) from error
    finally:
        staging.close()
    return Bundle.open(staging.folder)


def _check_same_checkpoint(staging: Staging, source: Checkpoint, report: Report) -> None:
    known = [result["checkpoint"] for result in staging.results() if "checkpoint" in result]
    if staging.previous:
        known.append(staging.previous.checkpoint["sha256"])
    if known and set(known) != {identify(source, report)}:
        raise UserError(
            f"{staging.folder} holds a bundle of another checkpoint (dsvl-export 0.4 did not count"
            " generation_config.json); give another folder."
        )
