"""The parity check of one backend and precision of a bundle against the PyTorch reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsvl_export.cluster.ray_cluster import Spread
from dsvl_export.parity_check.audit import judge_audit
from dsvl_export.parity_check.entry_points import judge_entry_points
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.layers import judge_layers
from dsvl_export.parity_check.localization import components_to_localize, localize
from dsvl_export.parity_check.long_context import LongGoldens, bundled_long_goldens, judge_long_context
from dsvl_export.parity_check.quantization_error import (
    QuantizationError,
    measure_long_golden,
    measure_quantization_error,
    read_quantization_error,
)
from dsvl_export.parity_check.result import ParityResult
from dsvl_export.parity_check.run_stages import run_stages
from dsvl_export.parity_check.task import judge_task, score_on_cluster, score_with_progress
from dsvl_export.parity_check.text import bundled_texts, judge_text
from dsvl_export.parity_check.tolerances import (
    Tolerance,
    are_overridden,
    component_tolerances,
    load_tolerances,
)
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.mixes import Pair, device_of
from runtimes.errors import UserError
from runtimes.execution import execution
from runtimes.goldens.taps import TAPPED_COMPONENTS
from runtimes.goldens.task import TaskItem, TaskScore, recorded_score
from runtimes.goldens.texts import TextGoldens
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions

if TYPE_CHECKING:
    from reference.checkpoint.checkpoint import Checkpoint

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recorded:
    """Outputs of the reference; None stands for what an earlier release did not record."""

    goldens: Goldens
    quantization_error: QuantizationError
    texts: TextGoldens | None
    long: LongGoldens | None


def silent(name: str, done: int, total: int) -> None:
    """Report nothing; the default ``on_step``."""


def parity(
    bundle: str | Path | Bundle,
    backend: str | None = None,
    precision: str | None = None,
    *,
    task: list[TaskItem] | None = None,
    taps: bool = False,
    live: str | None = None,
    adapters: Sequence[str] = (),
    tolerances: dict[str, Tolerance] | None = None,
    threads: int | None = None,
    device: str | None = None,
    on_step: OnStep = silent,
    spread: Spread | None = None,
) -> ParityResult:
    """Compare the artifacts of a bundle with the PyTorch reference, in stages.

    PyTorch is needed only for ``live``.

    Args:
        bundle: a bundle or its folder.
        backend: as in ``Pipeline.open``.
        precision: as in ``Pipeline.open``.
        task: questions for the stage ``task_accuracy``, which compares the exact match with fp32's.
            The fp32 answers are those recorded with the questions, those of the live reference, or
            those of the bundle's own fp32 artifacts.
        taps: compare layer by layer in every component, not only in those whose stage failed.
        live: a checkpoint to compute the reference from, instead of the recorded goldens.
        adapters: LoRA adapters to merge into ``live``, as in ``ExportConfig``.
        tolerances: from ``load_tolerances``; None is the shipped table.
        threads: number of CPU threads; None is the backend's choice.
        device: device to run on; None is the backend's own, or one that can simulate it here.
        on_step: called with the name of the step, the parts done and all parts.
        spread: runs the questions on the machines of a cluster.

    Returns:
        The stages and the verdict.

    Raises:
        UserError: the bundle has no goldens or cannot be opened, or ``live`` is another checkpoint.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    backend, precision = bundle.select(backend, precision)
    shipped = load_tolerances()
    reference = f"torch fp32, live from {live}" if live else "torch fp32, recorded in the bundle"
    result = ParityResult(backend, precision, execution(bundle, backend, precision, device), reference)
    precisions = {item.precision for item in bundle.artifacts(backend, precision).values()}
    result.is_fp32 = precisions == {"fp32"}
    result.tolerances = component_tolerances(tolerances or shipped, bundle, backend, precision)
    result.overridden = are_overridden(result.tolerances.values(), shipped)
    if not result.execution.runnable:
        return result
    device = result.execution.device
    pipeline = Pipeline.open(bundle, backend, precision, threads=threads, device=device)
    checkpoint = bundle.manifest.checkpoint["sha256"]
    source = _open_source(bundle, live, adapters) if live else None
    with ExitStack() as stack:
        if source:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            recorded = _record_live(bundle, source, (backend, precision), folder, on_step)
        else:
            recorded = Recorded(
                Goldens.of_bundle(bundle),
                read_quantization_error(bundle, precision),
                bundled_texts(bundle),
                bundled_long_goldens(bundle, bundle.artifact("decoder", backend, precision).precision),
            )
        goldens, quantization_error = recorded.goldens, recorded.quantization_error
        judge_audit(bundle, result)
        judge_text(pipeline.chain.tokenizer, recorded.texts, result)
        fitting = goldens.within(pipeline.capacity)
        result.left_out, goldens = len(goldens.files) - len(fitting.files), fitting
        run_stages(pipeline.chain, goldens, checkpoint, result, quantization_error, on_step)
        on_step("long context", 0, 1)
        bound = result.tolerances["decoder"].long_bound
        capacity = bundle.manifest.default_capacity
        judge_long_context(pipeline.chain, recorded.long, pipeline.max_capacity, capacity, bound, result)
        on_step("entry points", 0, 1)
        judge_entry_points(bundle, pipeline.chain, goldens, checkpoint, result, quantization_error, source)
        if any(item.base != "fp32" for item in bundle.artifacts(backend, precision).values()):
            result.advise_on_overflow()
        if task:
            baseline = _baseline(bundle, task, source, result, threads, on_step)
            if spread:
                model = (str(bundle.folder), backend, precision, threads, device)
                score = score_on_cluster(model, task, "task", on_step, spread)
            else:
                score = score_with_progress(pipeline, task, "task", on_step)
            judge_task(score, result, baseline)
        judge_layers(bundle, pipeline.chain, result, threads, on_step)
        for component in TAPPED_COMPONENTS if taps else components_to_localize(result):
            on_step(f"taps of the {component}", 0, 1)
            options = SessionOptions(threads, device_of(device, component))
            localization = localize(
                bundle, pipeline.chain, goldens, checkpoint, component, result, quantization_error, options
            )
            result.localizations.append(localization)
    return result


def _open_source(bundle: Bundle, live: str, adapters: Sequence[str]) -> Checkpoint:
    """Open the checkpoint that a bundle was exported from.

    Raises:
        UserError: it is another checkpoint.
    """
    # Deferred: imports torch.
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.checkpoint.lora_adapter import parse_adapters

    source = open_checkpoint(
        live, adapters=parse_adapters(adapters), built_in_prompt=bundle.manifest.prompt.keeps_built_in
    )
    if source.digest != bundle.manifest.checkpoint["sha256"]:
        merged = f" with the adapters {', '.join(adapters)}" if adapters else ""
        raise UserError(f"{live}{merged} is not the checkpoint that {bundle.folder} was exported from.")
    return source


def _record_live(bundle: Bundle, source: Checkpoint, choice: Pair, folder: Path, on_step: OnStep) -> Recorded:
    """Compute goldens, token embeddings and quantization errors from the checkpoint."""
    from calibration.planned_model import mixed_chain, planned_chain
    from dsvl_export.compilers.precisions import planned_weights
    from reference.goldens.record import (
        record_reference_goldens,
        record_reference_long_golden,
        record_reference_texts,
    )
    from reference.session import write_token_embedding

    table = folder / "token_embedding.safetensors"
    write_token_embedding(source, table)
    record_reference_goldens(source, table, folder / "goldens", partial(on_step, "reference"))
    goldens, texts = Goldens.recorded_into(folder / "goldens"), record_reference_texts(source)
    long = record_reference_long_golden(source, table, bundle.manifest.default_capacity)
    artifacts = bundle.artifacts(*choice)
    if all(item.precision == "fp32" for item in artifacts.values()):
        return Recorded(goldens, QuantizationError(), texts, LongGoldens(long, long))
    weights = {
        name: planned_weights(source, bundle.folder, item.precision) for name, item in artifacts.items()
    }
    tapped = mixed_chain(weights, table, tapped=True)
    on_measured = partial(on_step, "quantization error")
    measured = measure_quantization_error(tapped, source.digest, choice[1], goldens, on_measured)
    errors = QuantizationError(tuple(measured["goldens"]), measured["taps"])
    planned = measure_long_golden(planned_chain(weights["decoder"], table), choice[1], long)
    return Recorded(goldens, errors, texts, LongGoldens(long, planned))


def _baseline(
    bundle: Bundle,
    task: list[TaskItem],
    source: Checkpoint | None,
    result: ParityResult,
    threads: int | None,
    on_step: OnStep,
) -> tuple[str, TaskScore] | None:
    """Return what gives the fp32 answers that the task is compared with, and their score."""
    if source:
        from reference.session import reference_chain  # deferred: imports torch

        chain = reference_chain(source, bundle.path(bundle.manifest.token_embedding))
        manifest = bundle.manifest
        pipeline = Pipeline(chain, manifest.prompt.system_prompt, manifest.default_capacity)
        return "the torch reference", score_with_progress(pipeline, task, "task by the reference", on_step)
    recorded = recorded_score(task)
    if recorded:
        return "the recorded reference", recorded
    if result.is_fp32:
        return None
    for backend, precision in bundle.choices():
        failed = bundle.manifest.parity.get(f"{backend}/fp32", {}).get("verdict") == "failed"
        run = execution(bundle, backend, precision)
        if precision == "fp32" and not failed and run.runnable:
            name = f"{backend} fp32"
            pipeline = Pipeline.open(bundle, backend, "fp32", threads=threads, device=run.device)
            return name, score_with_progress(pipeline, task, f"task by {name}", on_step)
    return None
