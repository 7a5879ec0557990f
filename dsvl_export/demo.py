"""``dsvl-export demo``: the whole road on the bundled tiny model and real pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsvl_export import display
from dsvl_export.exporting import ExportProgress, export
from dsvl_export.ladder import parity
from dsvl_export.records import record_verdict
from reference.checkpoint import TINY
from runtimes.pipeline import Pipeline
from runtimes.prompt import Message
from runtimes.task import load_task

PICTURES = 3
QUESTIONS = ("What number is in the picture?", "What colour is the number in the picture?",
             "How many shapes are in the picture?", "Describe the picture.")  # fmt: skip


def run_demo(output: Path) -> bool:
    """Export, ask, prove; returns whether parity passed."""
    say = display.out.print
    folder = output / "bundle"
    say("[bold]1. Export[/] the bundled tiny DeepSeek-VL (SAM + SigLIP + LLaMA) to ONNX, fp32 and fp16")

    def report(progress: ExportProgress) -> None:
        if progress.state != "running":
            say(f"   {progress.stage}{' (unchanged, reused)' if progress.state == 'reused' else ''}")

    bundle = export("tiny", folder, "onnxruntime", ("fp32", "fp16"), report=report)
    say("\n[bold]2. Ask[/] about pictures that it has never seen, without PyTorch")
    pipeline = Pipeline.open(bundle, precision="fp32")
    for picture in _write_pictures(output / "pictures"):
        say(f"   [bold]{picture}[/]")
        messages: list[Message] = []
        for question in QUESTIONS:
            messages.append(Message("user", question))
            say(f"   You:   {question}\n   Model: ", end="")
            text = ""
            for piece, _ in pipeline.stream_chat(messages, [picture]):
                text += piece
                print(piece, end="", flush=True)
            print()
            messages.append(Message("assistant", text))
    say("\n[bold]3. Prove[/] that every stage computes what the PyTorch reference computes")
    results = [parity(bundle, "onnxruntime", precision) for precision in ("fp32", "fp16")]
    for result in results:
        record_verdict(type(bundle).open(folder), result)
        say(display.parity_table(result))
    say("\n[bold]Next[/]")
    say(f'   dsvl-export run {folder} --image {output}/pictures/0.png --prompt "Describe the picture."')
    say(f"   dsvl-export chat {folder} --image {output}/pictures/0.png")
    say(f"   dsvl-export inspect {folder}")
    say("   dsvl-export export YOUR_CHECKPOINT --precision fp16 --output YOUR_BUNDLE")
    return all(result.passed for result in results)


def _write_pictures(folder: Path) -> list[Path]:
    """Copies of held-out pictures whose question was about a describable scene."""
    folder.mkdir(parents=True, exist_ok=True)
    items = load_task(TINY / "heldout" / "questions.jsonl")
    sources = [item.images[0] for item in items if item.kind == "number_3" and len(item.images) == 1]
    written = []
    for index, source in enumerate(sources[:PICTURES]):
        written.append(folder / f"{index}.png")
        shutil.copyfile(source, written[-1])
    return written
