"""The command line: ``dsvl-export demo | export | run | chat | parity | inspect | verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsvl_export.version import __version__
from runtimes.errors import UserError

if TYPE_CHECKING:
    from dsvl_export.ladder import ParityResult
    from runtimes.task import TaskItem

app = typer.Typer(
    help="Export DeepSeek-VL to the places where people run it, and prove that it computes the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BundleFolder = Annotated[Path, typer.Argument(help="Bundle folder, made by 'export'.", metavar="BUNDLE")]
Backend = Annotated[Optional[str], typer.Option(help="Backend of the bundle; default: its first.")]
Precision = Annotated[Optional[str], typer.Option(help="Precision of the bundle; default: its first.")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: the backend's choice.")]
Capacity = Annotated[
    Optional[int], typer.Option(min=1, help="Tokens that the KV cache holds; default: the bundle's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per answer on stdout.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check the SHA-256 of what is loaded.")]
Images = Annotated[
    Optional[list[Path]], typer.Option("--image", "-i", help="Image file; repeat for several.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set with this probability.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Stop = Annotated[Optional[list[str]], typer.Option(help="String that ends the answer; repeatable.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dsvl-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="'tiny' (bundled), a checkpoint folder, or a hub id.", metavar="CHECKPOINT")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the bundle: new, empty, or one to extend.")
    ],
    backend: Annotated[str, typer.Option(help="Where the bundle shall run.")] = "onnxruntime",
    precision: Annotated[
        Optional[list[str]], typer.Option(help="Precision, repeatable: fp32, fp16. Default: fp32.")
    ] = None,
    goldens: Annotated[
        bool, typer.Option("--goldens/--no-goldens", help="Record the reference's outputs for 'parity'.")
    ] = True,
    check: Annotated[bool, typer.Option("--parity/--no-parity", help="Run 'parity' on the result.")] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint into a bundle.

    An interrupted export goes on where it stopped when you run the same command again. The result
    is compared with the PyTorch reference; exit code 1 says that it differs.

    Example: dsvl-export export tiny --precision fp16 --output tiny-bundle
    """
    from rich.progress import TaskID

    from dsvl_export import display
    from dsvl_export.exporting import ExportProgress
    from dsvl_export.exporting import export as run_export
    from runtimes.bundle import Bundle

    precisions = precision or ["fp32"]
    with display.progress_bar() as bars:
        tasks: dict[str, TaskID] = {}

        def report(progress: ExportProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=None)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total)
            if progress.state == "reused":
                bars.console.print(f"[dim]{progress.stage}: unchanged, reused[/]")

        bundle = run_export(checkpoint, output, backend, precisions, goldens, report)
    results = [_parity(output, backend, each, None, None) for each in precisions if check and goldens]
    if as_json:
        bundle = Bundle.open(output)  # with the verdicts
        verdicts = [result.to_dict() for result in results]
        display.print_json(
            {"bundle": str(bundle.folder), "manifest": bundle.manifest.to_dict(), "parity": verdicts}
        )
    else:
        for result in results:
            display.out.print(display.parity_table(result))
        total = sum(entry.bytes for entry in bundle.manifest.files.values())
        print(f"Wrote {bundle.folder} ({display.size(total)}).")
        print(f'Next: dsvl-export run {bundle.folder} --image PICTURE --prompt "Describe the picture."')
    if not all(result.passed for result in results):
        raise typer.Exit(1)


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
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Ask one question about one or several images; the answer streams to stdout.

    Example: dsvl-export run tiny-bundle --image photo.png --prompt "What number is in the picture?"
    """
    from dsvl_export import display
    from runtimes.generate import Answer
    from runtimes.pipeline import Pipeline
    from runtimes.sampling import GenerationOptions

    options = GenerationOptions(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ())
    )
    pipeline = Pipeline.open(bundle, backend, precision, threads=threads, capacity=capacity, verify=verify)
    answer = Answer()
    for piece, answer in pipeline.stream_chat(prompt, image or [], options):  # noqa: B007
        if not as_json:
            print(piece, end="", flush=True)
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
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    as_json: JsonLines = False,
) -> None:
    """Talk about images, turn by turn; only what is new in a turn is computed.

    Inside: /image FILE adds an image to the next message, /reset starts over, /quit (or Ctrl-D) ends.
    """
    from dsvl_export.chatting import converse
    from runtimes.pipeline import Pipeline
    from runtimes.sampling import GenerationOptions

    options = GenerationOptions(max_new_tokens, temperature, seed=seed)
    pipeline = Pipeline.open(bundle, backend, precision, threads=threads, capacity=capacity, verify=verify)
    converse(pipeline, image or [], options, as_json)


@app.command()
def parity(
    bundle: BundleFolder,
    backend: Backend = None,
    precision: Precision = None,
    task: Annotated[
        Optional[str],
        typer.Option(
            help="Also measure exact match: 'heldout' (the tiny model's questions) or a JSONL file."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch reference, stage by stage; needs no PyTorch.

    Every backend and precision of the bundle is judged, or the one you name. Exit code 0: all
    passed; 1: something differs. The report goes into the bundle's reports folder.
    """
    from dsvl_export import display
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    opened.select(backend, precision)  # says what there is where nothing fits
    pairs = [pair for pair in opened.choices() if backend in (None, pair[0]) and precision in (None, pair[1])]
    results = [_parity(bundle, *pair, task, threads) for pair in pairs]
    if as_json:
        display.print_json([result.to_dict() for result in results])
    else:
        for result in results:
            display.out.print(display.parity_table(result))
    if not results or not all(result.passed for result in results):
        raise typer.Exit(1)


def _parity(
    folder: Path, backend: str, precision: str, task: str | None, threads: int | None
) -> ParityResult:
    """One run of the ladder with a progress bar; the verdict is kept in the bundle."""
    from dsvl_export import display
    from dsvl_export.ladder import parity as run_parity
    from dsvl_export.records import record_verdict
    from runtimes.bundle import Bundle

    opened = Bundle.open(folder)
    items = _task_items(task)
    with display.progress_bar() as bars:
        bar = bars.add_task("")

        def on_step(name: str, done: int, total: int) -> None:
            bars.update(bar, description=f"{backend} {precision}: {name}", completed=done, total=total)

        result = run_parity(opened, backend, precision, items, threads, on_step)
    try:
        record_verdict(opened, result)
    except (OSError, UserError) as error:  # a read-only bundle, or an export that is changing it
        print(f"The verdict was not kept in the bundle: {error}", file=sys.stderr)
    return result


def _task_items(task: str | None) -> list[TaskItem] | None:
    from runtimes.task import load_task

    if task is None:
        return None
    if task == "heldout":
        # Found without importing the package, which would need nothing but is PyTorch's.
        import importlib.util

        spec = importlib.util.find_spec("reference")
        assert spec and spec.submodule_search_locations
        return load_task(Path(spec.submodule_search_locations[0]) / "tiny" / "heldout" / "questions.jsonl")
    return load_task(Path(task))


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
def verify(bundle: BundleFolder, as_json: Json = False) -> None:
    """Check size and SHA-256 of every file of a bundle."""
    from dsvl_export import display
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    problems = opened.problems()
    if as_json:
        display.print_json({"bundle": str(bundle), "files": len(opened.manifest.files), "problems": problems})
    if problems:
        raise UserError(f"The bundle {bundle} is damaged: {'; '.join(problems)}.")
    if not as_json:
        print(f"All {len(opened.manifest.files)} files of {bundle} are as exported.")


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


def main() -> None:
    """Entry point: errors of the user's making are one sentence and exit code 2."""
    try:
        app()
    except SystemExit as done:
        if done.code == 130:  # how typer reports Ctrl-C
            print("Interrupted; an export goes on where it stopped when it is run again.", file=sys.stderr)
        raise
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        needs = error.name or str(error)
        print(f"Error: This needs {needs}; run: pip install 'dsvl-export[cpu]'.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
