"""The interactive conversation of ``dsvl-export chat``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from dsvl_export.cli.display import err
from dsvl_export.cli.terminal import answer_text, json_text, say_error
from runtimes.errors import UserError
from runtimes.generation.answer import Answer
from runtimes.generation.sampling import GenerationOptions
from runtimes.images import load_image
from runtimes.pipeline import Pipeline
from runtimes.text.prompt import Message, place_images

HELP = "/image FILE adds an image, /reset starts a new conversation, /quit ends the chat."


def converse(pipeline: Pipeline, first_images: list[Path], options: GenerationOptions, as_json: bool) -> None:
    """Read messages from stdin until it ends; print the answers as streams or as JSON lines."""
    messages: list[Message] = []
    images: list[Path] = []  # of the messages so far
    waiting = [_check_image(image) for image in first_images]  # for the next message
    err.print(f"[dim]{HELP}[/]")
    while True:
        try:
            line = input("" if as_json else "You: ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("The input is not valid UTF-8 text.") from error
        if line == "/quit":
            return
        if line == "/reset":
            messages, images, waiting = [], [], []
        elif line.startswith("/image "):
            try:
                waiting.append(_check_image(_image_file(line.removeprefix("/image "))))
            except UserError as error:
                say_error(str(error))
        elif line.startswith("/"):
            err.print(HELP)
        elif line:
            try:
                (question,) = place_images([Message("user", line)], len(waiting))
                answer = _answer(pipeline, [*messages, question], [*images, *waiting], options, as_json)
            except UserError as error:
                say_error(str(error))
                continue
            messages += [question, Message("assistant", answer.text)]
            images, waiting = [*images, *waiting], []


def _image_file(text: str) -> Path:
    """Return the file that the user typed, quoted or dragged into the terminal; expands ``~``."""
    file = Path(os.path.expanduser(text.strip()))  # noqa: PTH111 - pathlib raises
    if not file.exists():
        try:
            words = shlex.split(text)
        except ValueError:  # a quote that does not end
            words = []
        if len(words) == 1:
            return Path(os.path.expanduser(words[0]))  # noqa: PTH111
    return file


def _check_image(image: Path) -> Path:
    """Return an image file after checking that it can be read."""
    load_image(image)
    return image


def _answer(
    pipeline: Pipeline,
    messages: list[Message],
    images: list[Path],
    options: GenerationOptions,
    as_json: bool,
) -> Answer:
    """Answer a message and print the answer."""
    if as_json:
        answer = pipeline.chat(messages, images, options)
        print(json_text(vars(answer)), flush=True)
        return answer
    started, answer = False, Answer()
    for piece, answer in pipeline.stream_chat(messages, images, options):  # noqa: B007
        piece = answer_text(piece)
        print(piece if started else f"Model: {piece}", end="", flush=True)
        started = True
    print()
    return answer
