"""The interactive conversation of ``dsvl-export chat``."""

from __future__ import annotations

from pathlib import Path

from dsvl_export.display import err
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from runtimes.preprocess import load_image
from runtimes.prompt import IMAGE_PLACEHOLDER, Message
from runtimes.sampling import GenerationOptions

HELP = "/image FILE adds an image, /reset starts over, /quit ends."


def converse(pipeline: Pipeline, first_images: list[Path], options: GenerationOptions) -> None:
    """Read messages from stdin until it ends; print answers as they come."""
    messages: list[Message] = []
    images: list[Path] = []  # of the messages so far
    waiting = [_checked(image) for image in first_images]  # for the next message
    err.print(f"[dim]{HELP}[/]")
    while True:
        try:
            line = input("You: ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages, images, waiting = [], [], []
        elif line.startswith("/image "):
            try:
                waiting.append(_checked(Path(line.removeprefix("/image ").strip())))
            except UserError as error:
                err.print(f"Error: {error}", markup=False)
        elif line.startswith("/"):
            err.print(HELP)
        elif line:
            missing = len(waiting) - line.count(IMAGE_PLACEHOLDER)
            asked = Message("user", IMAGE_PLACEHOLDER * max(missing, 0) + line)
            try:
                text = _answer(pipeline, [*messages, asked], [*images, *waiting], options)
            except UserError as error:
                err.print(f"Error: {error}", markup=False)
                continue
            messages += [asked, Message("assistant", text)]
            images, waiting = [*images, *waiting], []


def _checked(image: Path) -> Path:
    load_image(image)
    return image


def _answer(
    pipeline: Pipeline, messages: list[Message], images: list[Path], options: GenerationOptions
) -> str:
    print("Model: ", end="", flush=True)
    text = ""
    for piece, _ in pipeline.stream_chat(messages, images, options):
        text += piece
        print(piece, end="", flush=True)
    print()
    return text
