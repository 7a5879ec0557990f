"""``--backend auto``: the fastest backend and precision for each component.

On this machine, every candidate is exported, checked for parity and measured. For another device,
the roofline bounds of ``plan`` decide.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsvl_export.bench.bench import BenchOptions, bench
from dsvl_export.compilers.precisions import check_request, plan_for
from dsvl_export.compilers.protocol import CompilesProgram
from dsvl_export.compilers.registry import check_options, load_compiler
from dsvl_export.exporter.adapters import refuse_backend
from dsvl_export.exporter.config import ComponentChoices, ExportConfig, parse_choice
from dsvl_export.exporter.drop import drop_choices
from dsvl_export.exporter.export import MAX_DEFAULT_CAPACITY, export_bundle
from dsvl_export.exporter.stages import ExportProgress, Report
from dsvl_export.exporter.staging import check_output
from dsvl_export.exporter.variants import list_variants
from dsvl_export.parity_check import parity
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.planning.plan import Planner, Request
from dsvl_export.targets.targets import Target, find_target
from reference.checkpoint.checkpoint import open_checkpoint
from reference.model.config import ModelConfig
from reference.trace import component_contract
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.mixes import COMPONENTS, Pair
from runtimes.errors import PrecisionOverflowError, UserError
from runtimes.execution import execution

THIS_MACHINE = "cpu"  # the target that is measured
# Candidates, unless the config names others.
MEASURED_PRECISIONS, ESTIMATED_PRECISIONS = ("fp32", "bf16"), ("bf16", "fp16", "fp32")
CONTEXT = 512  # tokens of the KV cache at which a decode step is measured
ANSWER_TOKENS = 64  # the seconds of a decoder are those of a prompt and of an answer of this length


@dataclass(frozen=True)
class Candidate:
    """A backend and precision, and what was found out about it.

    Args:
        backend: name of the backend.
        precision: as the config names it.
        name: of the precision in a bundle.
        dtype: of the tensors between components.
        seconds: component → seconds for one image, or one prompt and answer; empty if it cannot be
            chosen.
        problem: why it cannot be chosen.
    """

    backend: str
    precision: str
    name: str = ""
    dtype: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def pair(self) -> Pair:
        """Backend and precision in a bundle."""
        return self.backend, self.name


@dataclass(frozen=True)
class Fastest:
    """The result of ``export_fastest``.

    Args:
        bundle: the bundle.
        config: of the export, with the chosen components.
        candidates: all candidates, the chosen ones among them.
        measured: whether the seconds were measured here; otherwise they are roofline bounds.
    """

    bundle: Bundle
    config: ExportConfig
    candidates: tuple[Candidate, ...]
    measured: bool


def export_fastest(config: ExportConfig, output: str | Path, report: Report) -> Fastest:
    """Export the fastest backend and precision for each component.

    Candidates are the backends of the target that are installed, each in the precisions of the
    config, or in fp32, bf16 and, for another device, fp16. Components that the config names stay as
    they are. On this machine, only candidates that pass the parity check count. They are exported
    into a folder beside the output, ``OUTPUT.auto``, which is renamed to the output, or deleted if
    a bundle is extended. If the export is interrupted, the same call resumes it.

    Args:
        config: what to export, with the backend ``auto``.
        output: the bundle's folder.
        report: is called with progress.

    Raises:
        UserError: no candidate can be exported, or none passes the parity check; see
            ``export_bundle`` for others.
    """
    output = Path(output).expanduser()
    check_output(output)
    target = find_target(config.target or THIS_MACHINE)
    measured = target.name == THIS_MACHINE
    if measured and not config.goldens:
        raise UserError(
            "The backend auto chooses among what passes the parity check, which needs goldens; leave out"
            " --no-goldens."
        )
    model = open_checkpoint(config.checkpoint, weights=False).config
    candidates = _list_candidates(config, target, model)
    if measured:
        scratch = output.absolute().with_name(f"{output.absolute().name}.auto")
        found = [item if item.problem else _measure(config, item, scratch, report) for item in candidates]
    else:
        found = [item if item.problem else _estimate(config, model, target, item) for item in candidates]
    chosen = _choose(config, found)
    config = replace(config, backend=None, precisions=(), components=ComponentChoices(**chosen))
    if not measured or output.exists():
        bundle = export_bundle(config, output, report)
    else:
        bundle = export_bundle(config, scratch, report)
        (variant,) = list_variants(config.with_defaults())
        kept = (variant.backend, variant.precision)
        drop_choices(scratch, [pair for pair in bundle.choices() if pair != kept])
        scratch.rename(output)
        bundle = Bundle.open(output)
    if measured and scratch.exists():
        shutil.rmtree(scratch)
    return Fastest(bundle, config, tuple(found), measured)


def _list_candidates(config: ExportConfig, target: Target, model: ModelConfig) -> list[Candidate]:
    """Return the candidates; those that cannot be exported, or do not fit, have a problem.

    Raises:
        UserError: a component that the config names cannot be exported.
    """
    named: dict[str, str] = {}  # component → dtype
    for component, text in config.components.chosen().items():
        named[component] = _dtype(*parse_choice(component, text), model)
    candidates = []
    precisions = MEASURED_PRECISIONS if target.name == THIS_MACHINE else ESTIMATED_PRECISIONS
    options = config.compile_options(_capacity(config, model))
    for backend in target.backends:
        for precision in config.precisions or precisions:
            precision = target.full_precision(precision)
            candidate = Candidate(backend, precision)
            try:
                compiler = load_compiler(backend)
                if isinstance(compiler, CompilesProgram):
                    raise UserError(f"{backend} writes all components into one file.")
                if options.onnxruntime.switchable:
                    refuse_backend(backend)
                plan = plan_for(compiler, precision)
                check_options({backend: compiler}, options)
                check_request(backend, compiler, [plan], model, replace(options, target=target))
                candidate = replace(candidate, name=plan.name, dtype=_dtype(backend, precision, model))
                for component, dtype in named.items():
                    if dtype != candidate.dtype:
                        raise UserError(f"It does not fit the {component}, which reads and returns {dtype}.")
            except UserError as error:
                candidate = replace(candidate, problem=str(error))
            candidates.append(candidate)
    return candidates


def _dtype(backend: str, precision: str, model: ModelConfig) -> str:
    """Return the dtype of the tensors between components in a precision."""
    plan = plan_for(load_compiler(backend), precision)
    return component_contract(model, "decoder", plan.base).inputs[0].dtype


def _capacity(config: ExportConfig, model: ModelConfig) -> int:
    return config.capacity or min(MAX_DEFAULT_CAPACITY, model.decoder.max_positions)


def _measure(config: ExportConfig, candidate: Candidate, folder: Path, report: Report) -> Candidate:
    """Export a candidate, check its parity and measure it."""
    name = f"measuring {' '.join(candidate.pair)}"
    report(ExportProgress(name, 0, 3))
    single = replace(
        config, backend=candidate.backend, precisions=(candidate.precision,), components=ComponentChoices()
    )
    try:
        bundle = export_bundle(single, folder, report)
    except PrecisionOverflowError as error:
        return replace(candidate, problem=str(error))
    report(ExportProgress(name, 1, 3))
    run = execution(bundle, *candidate.pair)
    if run.kind != "ran":
        return replace(candidate, problem=f"it cannot be measured here: {run}.")
    if (verdict := _verdict(bundle, candidate.pair)) != "passed":
        return replace(candidate, problem=f"The parity check says: {verdict}.")
    report(ExportProgress(name, 2, 3))
    context = min(CONTEXT, bundle.manifest.default_capacity // 2)
    result = bench(folder, *candidate.pair, BenchOptions(contexts=(context,)))
    report(ExportProgress(name, 3, 3, "finished"))
    seconds = {component: result.stages[component].low for component in COMPONENTS[:2]}
    seconds["decoder"] = result.stages["prefill"].low + ANSWER_TOKENS * result.decoding[0].step.low
    return replace(candidate, seconds=seconds)


def _verdict(bundle: Bundle, pair: Pair) -> str:
    """Return the verdict of the parity check, which an earlier call may have recorded."""
    recorded = bundle.manifest.parity.get("/".join(pair), {})
    if recorded.get("verdict") == "passed" and recorded.get("tolerances") == "shipped":
        return "passed"
    result = parity(bundle, *pair)
    record_verdict(bundle, result)
    return result.verdict


def _estimate(config: ExportConfig, model: ModelConfig, target: Target, candidate: Candidate) -> Candidate:
    """Predict the seconds of a candidate."""
    request = Request(candidate.backend, candidate.precision, _capacity(config, model))
    try:
        plan = Planner(model).plan(target, request)
    except UserError as error:
        return replace(candidate, problem=str(error))
    if not plan.fits:
        return replace(candidate, problem="It does not fit into the memory of the target.")
    decoder = plan.prefill_seconds + ANSWER_TOKENS / plan.tokens_per_second
    return replace(candidate, seconds={**plan.encoder_seconds, "decoder": decoder})


def _choose(config: ExportConfig, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return the fastest candidate of each component as ``BACKEND:PRECISION``.

    All components have the same dtype between them: the one with the smallest sum.

    Raises:
        UserError: there is none.
    """
    named, choices = config.components.chosen(), []
    for dtype in dict.fromkeys(item.dtype for item in candidates if item.seconds):
        able = [item for item in candidates if item.seconds and item.dtype == dtype]
        fastest = {
            name: min(able, key=lambda item: _rounded(item.seconds[name]))
            for name in COMPONENTS
            if name not in named
        }
        total = sum(item.seconds[name] for name, item in fastest.items())
        choices.append((total, {name: f"{item.backend}:{item.precision}" for name, item in fastest.items()}))
    if not choices:
        if len({item.problem for item in candidates}) == 1:
            raise UserError(candidates[0].problem)
        problems = [f"{item.backend} {item.precision}: {item.problem.rstrip('.')}" for item in candidates]
        raise UserError(f"There is no backend to choose from ({'; '.join(problems)}).")
    _, chosen = min(choices, key=lambda choice: choice[0])
    return {name: named.get(name) or chosen[name] for name in COMPONENTS}


def _rounded(seconds: float) -> float:
    """Round to two digits: of two that are about equally fast, the first candidate is chosen."""
    return float(f"{seconds:.2g}")
