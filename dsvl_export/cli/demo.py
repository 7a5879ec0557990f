"""The command ``demo``: export, run and check the bundled tiny model."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.options import Json
from dsvl_export.cli.terminal import without_controls

IMAGES = 3
QUESTIONS = (
    "What number is in the picture?",
    "What colour is the number in the picture?",
    "How many shapes are in the picture?",
    "Describe the picture.",
)


@command("demo")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the bundle and the images.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Export the bundled tiny model, ask it about images, and run the parity check."""
    if not run_demo(output, as_json):
        raise typer.Exit(1)


def run_demo(output: Path, as_json: bool) -> bool:
    """Export the tiny model, ask it about images, run the parity check; return whether that passed.

    Args:
        output: folder for the bundle and the images.
        as_json: print the steps on stderr and one JSON document (answers, verdicts) on stdout.
    """
    from dsvl_export.cli import display
    from dsvl_export.exporter.export import export
    from dsvl_export.exporter.stages import ExportProgress
    from dsvl_export.parity_check import ParityResult, parity
    from dsvl_export.parity_check.report.document import make_document
    from dsvl_export.parity_check.report.record import record_verdict
    from reference.tiny import HELDOUT
    from runtimes.goldens.task import load_task
    from runtimes.pipeline import Pipeline
    from runtimes.text.prompt import Message

    output = output.expanduser()
    console = display.err if as_json else display.out

    def say(text: str, end: str = "\n") -> None:
        console.print(without_controls(text), end=end, markup=False)

    folder = output / "bundle"
    say("1. Export the bundled tiny DeepSeek-VL (SAM + SigLIP + LLaMA) to ONNX, fp32 and fp16")

    def report(progress: ExportProgress) -> None:
        # Estimates of sizes run before each stage, and write nothing.
        if progress.state != "running" and not progress.stage.startswith("sizes of "):
            say(f"   {progress.stage}{' (unchanged, reused)' if progress.state == 'reused' else ''}")

    bundle = export("tiny", folder, "onnxruntime", ("fp32", "fp16"), report=report)
    say("\n2. Ask about held-out images, without PyTorch")
    pipeline = Pipeline.open(bundle, precision="fp32")
    answers: list[dict[str, Any]] = []
    for image in _write_images(output / "pictures"):
        say(f"   {image}")
        messages: list[Message] = []
        for question in QUESTIONS:
            messages.append(Message("user", question))
            say(f"   You:   {question}\n   Model: ", end="")
            text = ""
            for piece, _ in pipeline.stream_chat(messages, [image]):
                text += piece
                say(piece, end="")
            say("")
            messages.append(Message("assistant", text))
            answers.append({"picture": str(image), "question": question, "answer": text})
    say("\n3. Run the parity check: compare every stage with the PyTorch reference")
    questions = load_task(HELDOUT)
    results: list[ParityResult] = []

    def check(backend: str, precision: str) -> None:
        result = parity(bundle, backend, precision, task=questions, taps=True)
        results.append(result)
        page = record_verdict(bundle, result)
        display.print_parity(result, console)
        say(f"   Report: {page}")

    for precision in ("fp32", "fp16"):
        check("onnxruntime", precision)
    if find_spec("tensorrt_rtx"):
        say("\n4. Build INT8 engines for NVIDIA GPUs from the same programs, without a GPU, and check them")
        bundle = export("tiny", folder, "tensorrt_rtx", ("int8",), report=report)
        check(*bundle.select("tensorrt_rtx", "int8"))
    say("\nNext")
    say(f'   dsvl-export run {folder} --image {output}/pictures/0.png --prompt "Describe the picture."')
    say(f"   dsvl-export chat {folder} --image {output}/pictures/0.png")
    say(f"   dsvl-export inspect {folder}")
    say("   dsvl-export export YOUR_CHECKPOINT --precision fp16 --output YOUR_BUNDLE")
    if as_json:
        documents = [make_document(bundle, result) for result in results]
        display.print_json({"answers": answers, "parity": documents})
    return all(result.passed for result in results)


def _write_images(folder: Path) -> list[Path]:
    """Copy held-out images with three-digit numbers into a folder."""
    from reference.tiny import HELDOUT
    from runtimes.goldens.task import load_task

    folder.mkdir(parents=True, exist_ok=True)
    items = load_task(HELDOUT)
    sources = [item.images[0] for item in items if item.kind == "number_3" and len(item.images) == 1]
    written = []
    for index, source in enumerate(sources[:IMAGES]):
        written.append(folder / f"{index}.png")
        shutil.copyfile(source, written[-1])
    return written
