"""Commands that make bundles, ask them and look into them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsvl_export.cli.app import app
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
from dsvl_export.terminal import say

if TYPE_CHECKING:
    from dsvl_export.ladder import ParityResult
    from dsvl_export.ladder.against_reference import OnStep
    from runtimes.bundle import Bundle
    from runtimes.pipeline import Pipeline


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the bundle: new, empty, or one to extend.")
    ],
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="onnxruntime, tensorrt, tensorrt_rtx, coreml, coreai or executorch. Default: the target's"
            " first, or onnxruntime."
        ),
    ] = None,
    precision: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Precision, repeatable: fp32, fp16, bf16, int8, fp8, int4, int8-int4, int8-weights,"
            " palette4, kv-int8, 8da4w, 8da4w-g128, 8da8w, or the YAML file of a precision plan. Default:"
            " fp32, or fp16 where there is no fp32."
        ),
    ] = None,
    scales: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Scale table made by 'calibrate'. Default: calibrate on the bundled pictures where needed.",
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(help="Device, as 'targets' lists them: what it cannot run is refused before any work."),
    ] = None,
    tensorrt: Annotated[
        Optional[str],
        typer.Option(
            metavar="VERSION", help="TensorRT that will build, as in 10.3. Default: the target's, or 11.4."
        ),
    ] = None,
    sm: Annotated[
        Optional[list[int]],
        typer.Option(
            help="Compute capability that tensorrt_rtx builds for, repeatable. Default: 86, 89 and 120."
        ),
    ] = None,
    capacity: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Tokens of the KV cache, fixed in engines and Apple's packages. Default: 2048, or the"
            " model's positions.",
        ),
    ] = None,
    deployment: Annotated[
        Optional[str],
        typer.Option(
            "--deployment-target",
            metavar="SYSTEM",
            help="Oldest system to run on, for coreml (iOS18, macOS15) and coreai (iOS27, macOS27).",
        ),
    ] = None,
    delegate: Annotated[
        Optional[str],
        typer.Option(
            help="What executorch runs the encoders on: xnnpack (the default), or coreml or vulkan, which"
            " only a device executes."
        ),
    ] = None,
    prefill: Annotated[
        bool,
        typer.Option(
            "--prefill/--no-prefill",
            help="With 8da4w, give onnxruntime a second decoder with 8-bit weights for prompts: twice as fast"
            " there, for three times the disk and memory.",
        ),
    ] = True,
    goldens: Annotated[
        bool,
        typer.Option(
            "--goldens/--no-goldens", help="Record the reference's outputs for 'parity', and audit the files."
        ),
    ] = True,
    check: Annotated[bool, typer.Option("--parity/--no-parity", help="Run 'parity' on the result.")] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint into a bundle.

    An interrupted export goes on where it stopped when you run the same command again. The result
    is compared with the PyTorch reference; exit code 1 says that it differs.

    Example: dsvl-export export tiny --precision fp16 --output tiny-bundle
    """
    from rich.markup import escape
    from rich.progress import TaskID

    from dsvl_export import display
    from dsvl_export.compilers import load_compiler
    from dsvl_export.defects import warnings_for
    from dsvl_export.export_stages import ExportProgress
    from dsvl_export.exporting import export as run_export
    from dsvl_export.planner.targets import find_target
    from dsvl_export.precisions import plan_for
    from dsvl_export.units import size
    from runtimes.bundle import Bundle
    from runtimes.runner_tokenizer import RUNNER_TOKENIZER

    device = find_target(target) if target else None
    backend = backend or (next(iter(device.backends)) if device else "onnxruntime")
    compiler = load_compiler(backend)
    given = precision or ["fp32" if "fp32" in compiler.PRECISIONS else compiler.PRECISIONS[0]]
    plans = [plan_for(compiler, each) for each in given]
    precisions = [plan.name for plan in plans]
    name = device.name if device else None
    defects = {str(defect): None for each in precisions for defect in warnings_for(backend, each, name)}
    for text in defects:
        display.err.print(f"[yellow]Known defect:[/] {escape(text)}")
    if scales is None and checkpoint != "tiny" and any(plan.quantizes_activations for plan in plans):
        display.err.print(
            "[yellow]Calibrating on the bundled pictures:[/] for better scales run 'dsvl-export calibrate'"
            " on images of your own and give --scales."
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
                checkpoint, output, backend, given, goldens, report, scales, target, tensorrt, capacity,
                sm or (), deployment, delegate, prefill,
            )  # fmt: skip
        except KeyboardInterrupt:
            display.err.print("The export goes on where it stopped when it is run again.")
            raise
    for each in precisions:
        found = bundle.artifact("decoder", backend, each).tools.get(RUNNER_TOKENIZER, "")
        if found.startswith("none"):
            display.err.print(
                f"[yellow]No tokenizer for ExecuTorch's runner ({each}):[/] {escape(found[6:])}."
                " Apps must give the runner token ids instead of text; see docs/executorch.md."
            )
    verdicts = [
        judge(output, f"{backend} {each}", partial(_climb, backend, each))
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
    """The oldest ONNX Runtime for the artifacts, as a sentence; empty where none runs them."""
    from runtimes.onnxruntime_releases import NEEDED, newest

    found = [
        item.tools[NEEDED]
        for item in bundle.manifest.artifacts
        if item.backend == backend and item.precision in precisions and NEEDED in item.tools
    ]
    where = "" if backend == "onnxruntime" else " to run without a GPU"
    return f"Needs ONNX Runtime {newest(found)} or later{where}." if found else ""


def _next_step(bundle: Bundle, backend: str) -> str:
    ask = f'dsvl-export run {bundle.folder} --image PICTURE --prompt "Describe the picture."'
    if backend == "tensorrt":
        return (
            f"copy {bundle.folder} to the device and run there: dsvl-export build-engine {bundle.folder.name}"
        )
    return ask if backend != "tensorrt_rtx" else f"{ask} (on a machine without a GPU: with --device cpu)"


def _climb(backend: str, precision: str, bundle: Bundle, on_step: OnStep) -> ParityResult:
    from dsvl_export.ladder import parity

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
    """Open a bundle to run it; says so where the machine's free memory is less than that takes."""
    from runtimes.bundle import Bundle
    from runtimes.engines.trust import trust_engines
    from runtimes.pipeline import Pipeline

    bundle = Bundle.open(folder)
    if trust_engine:
        trust_engines(bundle)
    backend, precision = bundle.select(backend, precision)
    remedy = "take a smaller precision or --capacity"
    warn_of_memory(bundle, backend, precision, device, capacity, remedy)
    return Pipeline.open(
        bundle, backend, precision, threads=threads, device=device, capacity=capacity, verify=verify
    )


@app.command()
def run(
    bundle: BundleFolder,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The question. <image_placeholder> marks where images go; without it they come first.",
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
    """Ask one question about one or several images; the answer streams to stdout.

    Example: dsvl-export run tiny-bundle --image photo.png --prompt "What number is in the picture?"
    """
    from dsvl_export import display
    from dsvl_export.terminal import answer_text
    from runtimes.generate import Answer
    from runtimes.sampling import GenerationOptions

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


@app.command()
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
    """Talk about images, turn by turn; only what is new in a turn is computed.

    Inside: /image FILE adds an image to the next message, /reset starts over, /quit (or Ctrl-D) ends.
    """
    from dsvl_export.chatting import converse
    from runtimes.sampling import GenerationOptions

    options = GenerationOptions(max_new_tokens, temperature, seed=seed, drafts=drafts)
    pipeline = open_pipeline(bundle, backend, precision, threads, device, capacity, verify, trust_engine)
    converse(pipeline, image or [], options, as_json)


@app.command()
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Show what a bundle holds: model, artifacts, sizes, contracts, verdicts."""
    from dsvl_export import display
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        display.print_json(opened.manifest.to_dict())
    else:
        for table in display.bundle_tables(opened):
            display.out.print(table)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the bundle and the pictures.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Export the bundled tiny model, ask it about pictures, and show the proof."""
    from dsvl_export.demo import run_demo

    if not run_demo(output, as_json):
        raise typer.Exit(1)
