"""Commands that write, run and show bundles: ``export``, ``run``, ``chat``, ``inspect`` and ``demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import complete_backends, complete_precisions, complete_targets, values
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    Backend,
    BundleFolder,
    Capacity,
    Checkpoint,
    Device,
    Drafts,
    Images,
    Json,
    JsonLines,
    MaxNewTokens,
    Penalty,
    Precision,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    TrustEngine,
    Verify,
)  # fmt: skip
from dsvl_export.cli.proof import judge, leave_with
from dsvl_export.cli.terminal import say

if TYPE_CHECKING:
    from dsvl_export.parity_check import ParityResult
    from dsvl_export.parity_check.against_reference import OnStep
    from runtimes.bundle.bundle import Bundle
    from runtimes.pipeline import Pipeline

# Panels of the help of ``export``.
BACKEND_OPTIONS = "Options of one backend"
CHECKS = "Checks"


@command("export")
def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Bundle folder: a new or empty folder, or a bundle to add artifacts to."
        ),
    ],
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="onnxruntime, tensorrt, tensorrt_rtx, coreml, coreai or executorch. Default: the first"
            " backend of the target, or onnxruntime.",
            autocompletion=complete_backends,
        ),
    ] = None,
    precision: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Precision, repeatable: fp32, fp16, bf16, int8, fp8, int4, int8-int4, int8-weights,"
            " palette4, kv-int8, 8da4w, 8da4w-g128, 8da8w, or the YAML file of a precision plan. Default:"
            " fp32, or fp16 if the backend does not support fp32.",
            autocompletion=complete_precisions,
        ),
    ] = None,
    scales: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Folder with the scale table that 'calibrate' wrote. Default: if the precision needs scales,"
            " calibrate on the bundled images.",
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(
            help="Target device, one of those that 'targets' lists. An export that the device cannot run is"
            " refused before it starts.",
            autocompletion=complete_targets,
        ),
    ] = None,
    tensorrt: Annotated[
        Optional[str],
        typer.Option(
            metavar="VERSION",
            help="Version of TensorRT that builds the engines, for example 10.3. Default: the target's, or"
            " 11.4.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    sm: Annotated[
        Optional[list[int]],
        typer.Option(
            help="Compute capability to build tensorrt_rtx engines for, repeatable. Default: 86, 89 and 120.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    capacity: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Capacity of the KV cache, in tokens; fixed at export in engines and Apple packages."
            " Default: 2048, or the model's number of positions if that is smaller.",
        ),
    ] = None,
    deployment: Annotated[
        Optional[str],
        typer.Option(
            "--deployment-target",
            metavar="SYSTEM",
            help="Oldest operating system to support, for coreml (iOS18, macOS15) and coreai (iOS27,"
            " macOS27).",
            rich_help_panel=BACKEND_OPTIONS,
            autocompletion=values("iOS18", "macOS15", "iOS27", "macOS27"),
        ),
    ] = None,
    delegate: Annotated[
        Optional[str],
        typer.Option(
            help="ExecuTorch delegate for the encoders: xnnpack (the default), coreml or vulkan. Only a"
            " device can run coreml and vulkan.",
            rich_help_panel=BACKEND_OPTIONS,
            autocompletion=values("xnnpack", "coreml", "vulkan"),
        ),
    ] = None,
    prefill: Annotated[
        bool,
        typer.Option(
            "--prefill/--no-prefill",
            help="With onnxruntime and 8da4w, add a second decoder with 8-bit weights for prefill: prefill is"
            " twice as fast, and the decoder takes three times the disk space and memory.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = True,
    goldens: Annotated[
        bool,
        typer.Option(
            "--goldens/--no-goldens",
            help="Record reference outputs for 'parity', and compare the written files with the checkpoint.",
            rich_help_panel=CHECKS,
        ),
    ] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--parity/--no-parity", help="Run the parity check on the bundle.", rich_help_panel=CHECKS
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint into a bundle.

    The parity check compares the bundle with the PyTorch reference. If the export is interrupted, run the
    same command again: the export resumes.

    Exit code 0: all stages passed; 1: the bundle differs from the reference, or the precision overflows; 3:
    the parity check could not judge the bundle on this machine.

    Example: dsvl-export export tiny --precision fp16 --output tiny-bundle
    """
    from rich.markup import escape
    from rich.progress import TaskID

    from dsvl_export.cli import display
    from dsvl_export.compilers import load_compiler
    from dsvl_export.compilers.precisions import plan_for
    from dsvl_export.exporter.export import export as run_export
    from dsvl_export.exporter.stages import ExportProgress
    from dsvl_export.targets.defects import warnings_for
    from dsvl_export.targets.targets import find_target
    from runtimes.backends.executorch_tokenizer import RUNNER_TOKENIZER
    from runtimes.bundle.bundle import Bundle
    from runtimes.units import size

    device = find_target(target) if target else None
    backend = backend or (next(iter(device.backends)) if device else "onnxruntime")
    compiler = load_compiler(backend)
    names = precision or ["fp32" if "fp32" in compiler.PRECISIONS else compiler.PRECISIONS[0]]
    plans = [plan_for(compiler, name) for name in names]
    precisions = [plan.name for plan in plans]
    device_name = device.name if device else None
    defects = {str(row): None for each in precisions for row in warnings_for(backend, each, device_name)}
    for text in defects:
        display.err.print(f"[yellow]Known defect:[/] {escape(text)}")
    if scales is None and checkpoint != "tiny" and any(plan.quantizes_activations for plan in plans):
        display.err.print(
            "[yellow]Calibrating on the bundled images.[/] For better scales, run 'dsvl-export calibrate'"
            " on your own images and pass the result as --scales."
        )
    with display.progress_bar() as bars:
        tasks: dict[str, TaskID] = {}
        in_bytes: set[str] = set()

        def report(progress: ExportProgress) -> None:
            name, counted = progress.stage, progress.in_bytes
            if name not in tasks:
                tasks[name] = bars.add_task(display.plain(name), total=None)
            if counted and name not in in_bytes:  # what was there before does not count as speed
                in_bytes.add(name)
                bars.reset(tasks[name], total=progress.total, completed=progress.done, in_bytes=True)
            bars.update(tasks[name], completed=progress.done, total=progress.total, in_bytes=counted)
            if progress.state == "reused":
                bars.console.print(f"[dim]{escape(progress.stage)}: unchanged, reused[/]")

        try:
            bundle = run_export(
                checkpoint, output, backend, names, goldens, report, scales, target, tensorrt, capacity,
                sm or (), deployment, delegate, prefill,
            )  # fmt: skip
        except KeyboardInterrupt:
            display.err.print("Run the same command again: the export resumes.")
            raise
    for each in precisions:
        tokenizer = bundle.artifact("decoder", backend, each).tools.get(RUNNER_TOKENIZER, "")
        if tokenizer.startswith("none"):
            display.err.print(
                f"[yellow]No tokenizer for ExecuTorch's runner ({each}):[/] {escape(tokenizer[6:])}."
                " Apps must pass token ids to the runner instead of text; see docs/tutorials/executorch.md."
            )
    verdicts = [
        judge(output, f"{backend} {each}", partial(_run_parity, backend, each))
        for each in precisions
        if check and goldens
    ]
    results = [result for _, result in verdicts]
    if as_json:
        bundle = Bundle.open(output)  # with the verdicts
        documents = [document for document, _ in verdicts]
        display.print_json(
            {"bundle": str(bundle.folder), "manifest": bundle.manifest.to_dict(), "parity": documents}
        )
    else:
        for result in results:
            display.print_parity(result)
        total = sum(entry.bytes for entry in bundle.manifest.files.values())
        say(f"Wrote {bundle.folder} ({size(total)}).")
        if difference := bundle.manifest.prompt.template_difference:
            say(f"Warning: {difference}")
        if needs := _needs(bundle, backend, precisions):
            say(needs)
        say(f"Next: {_next_step(bundle, backend)}")
    leave_with(results)


def _needs(bundle: Bundle, backend: str, precisions: list[str]) -> str:
    """Return the oldest ONNX Runtime for the artifacts as a sentence; empty if none runs them."""
    from runtimes.backends.onnxruntime_releases import NEEDED, newest

    releases = [
        item.tools[NEEDED]
        for item in bundle.manifest.artifacts
        if item.backend == backend and item.precision in precisions and NEEDED in item.tools
    ]
    where = "" if backend == "onnxruntime" else " to run without a GPU"
    return f"Needs ONNX Runtime {newest(releases)} or later{where}." if releases else ""


def _next_step(bundle: Bundle, backend: str) -> str:
    """Return the command to run after an export."""
    ask = f'dsvl-export run {bundle.folder} --image IMAGE --prompt "Describe the picture."'
    if backend == "tensorrt":
        return f"copy {bundle.folder} to the device and run: dsvl-export build-engine {bundle.folder.name}"
    return ask if backend != "tensorrt_rtx" else f"{ask} (on a machine without a GPU: with --device cpu)"


def _run_parity(backend: str, precision: str, bundle: Bundle, on_step: OnStep) -> ParityResult:
    """Run the parity check of one precision."""
    from dsvl_export.parity_check import parity

    warn_of_memory(bundle, backend, precision)
    return parity(bundle, backend, precision, on_step=on_step)


def open_pipeline(
    folder: Path,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    device: str | None,
    capacity: int | None,
    verify: bool,
    trust_engine: bool,
) -> Pipeline:
    """Open a bundle to run it, and warn if the machine has too little free memory."""
    from runtimes.backends.engines.trust import trust_engines
    from runtimes.bundle.bundle import Bundle
    from runtimes.pipeline import Pipeline

    bundle = Bundle.open(folder)
    if trust_engine:
        trust_engines(bundle)
    backend, precision = bundle.select(backend, precision)
    remedy = "use a smaller precision or --capacity"
    warn_of_memory(bundle, backend, precision, device, capacity, remedy)
    return Pipeline.open(
        bundle, backend, precision, threads=threads, device=device, capacity=capacity, verify=verify
    )


@command("run")
def run(
    bundle: BundleFolder,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The question. <image_placeholder> marks the position of an image; without it, images come"
            " first.",
        ),
    ],
    image: Images = None,
    backend: Backend = None,
    precision: Precision = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    drafts: Drafts = True,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Answer a question about images; the answer streams to stdout.

    Example: dsvl-export run tiny-bundle --image photo.png --prompt "What number is in the picture?"
    """
    from dsvl_export.cli import display
    from dsvl_export.cli.terminal import answer_text
    from runtimes.generation.decoding import Answer
    from runtimes.generation.sampling import GenerationOptions

    options = GenerationOptions(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ()), drafts
    )
    pipeline = open_pipeline(bundle, backend, precision, threads, device, capacity, verify, trust_engine)
    answer = Answer()
    for piece, answer in pipeline.stream_chat(prompt, image or [], options):  # noqa: B007
        if not as_json:
            print(answer_text(piece), end="", flush=True)
    if as_json:
        display.print_json({**vars(answer), "tokens_per_second": answer.tokens_per_second})
        return
    print()
    display.err.print(
        f"[dim]{len(answer.tokens)} tokens ({answer.finish_reason}), first after"
        f" {answer.first_token_seconds:.2f} s, then {answer.tokens_per_second:.1f} per second[/]"
    )


@command("chat")
def chat(
    bundle: BundleFolder,
    image: Images = None,
    backend: Backend = None,
    precision: Precision = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    drafts: Drafts = True,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    trust_engine: TrustEngine = False,
    as_json: JsonLines = False,
) -> None:
    """Chat about images; each turn computes only what is new.

    In the chat, /image FILE adds an image to the next message, /reset starts a new conversation, and /quit
    (or Ctrl-D) ends the chat.
    """
    from dsvl_export.cli.conversation import converse
    from runtimes.generation.sampling import GenerationOptions

    options = GenerationOptions(max_new_tokens, temperature, seed=seed, drafts=drafts)
    pipeline = open_pipeline(bundle, backend, precision, threads, device, capacity, verify, trust_engine)
    converse(pipeline, image or [], options, as_json)


@command("inspect")
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Show the contents of a bundle: model, artifacts, sizes, contracts and parity verdicts."""
    from dsvl_export.cli import display
    from runtimes.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        display.print_json(opened.manifest.to_dict())
    else:
        for table in display.bundle_tables(opened):
            display.out.print(table)


@command("demo")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the bundle and the images.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Export the bundled tiny model, ask it about images, and run the parity check."""
    from dsvl_export.cli.demo import run_demo

    if not run_demo(output, as_json):
        raise typer.Exit(1)
