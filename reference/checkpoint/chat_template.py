"""A checkpoint's own chat template, compared with the built-in prompt format.

The prompt format is built in; a checkpoint's ``chat_template`` (Jinja, as transformers renders it) is only
compared with it. The template is rendered in jinja2's sandbox, in a process of its own that is ended after
``SECONDS``, since a checkpoint is untrusted input.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

from reference.checkpoint.checkpoint import Checkpoint
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.text.prompt import EOS, Message, format_chat
from runtimes.text.tokenizer import PromptSpec, Tokenizer

SECONDS = 20.0
CONTEXT = 24  # characters that are quoted around the first difference
# Conversations as transformers' templates take them.
TEXT: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two?"}]}]
TURNS: list[dict[str, Any]] = [
    *IMAGE,
    {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
]
LATER_SYSTEM = [*TURNS[:2], {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, TURNS[2]]
CONVERSATIONS: list[list[dict[str, Any]]] = [TEXT, IMAGE, TURNS, PARTS, LATER_SYSTEM]
# As the templates of text models take them: one text a message.
SIMPLE: list[list[dict[str, Any]]] = [
    [{**message, "content": message["content"][0]["text"]} for message in messages]
    for messages in (TEXT, [*TEXT, *TURNS[1:]])
]

RENDER = """
import json, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

def raise_exception(message):
    raise ValueError(message)

given = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.globals["raise_exception"] = raise_exception
try:
    template = environment.from_string(given["template"])
    texts = [template.render(messages=messages, add_generation_prompt=True, **given["values"])[:20000]
             for messages in given["conversations"]]
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
else:
    print(json.dumps({"texts": texts}))
"""


def template_difference(checkpoint: Checkpoint, spec: PromptSpec) -> str:
    """How the checkpoint's chat template differs from the built-in prompt, in one sentence.

    Empty where it does not, or where the checkpoint has none.
    """
    found = _find(checkpoint.folder)
    if found is None:
        return ""
    name, template = found
    if importlib.util.find_spec("jinja2") is None:
        return f"The chat template in {name} was not compared with the built-in prompt: pip install jinja2."
    tokenizer = Tokenizer(checkpoint.tokenizer_files[0], spec)
    bos, eos = tokenizer.pieces([spec.bos_id, spec.eos_id])
    values = {"bos_token": bos, "eos_token": eos}
    differences: list[str] = []
    errors: list[str] = []
    for conversations in (CONVERSATIONS, SIMPLE):
        rendered = _render(template, conversations, values)
        if isinstance(rendered, str):
            errors.append(f"it cannot be evaluated ({rendered})")
            continue
        texts = [text.removeprefix(bos).replace(eos, EOS).strip() for text in rendered]
        here = [_difference(*pair, spec) for pair in zip(texts, conversations, strict=True)]
        if not any(here):
            return ""
        differences += filter(None, here)
    reason = [*differences, *errors][0]
    return f"The chat template in {name} differs from the built-in prompt, which is used: {reason}."


def _find(folder: Path) -> tuple[str, str] | None:
    """The name of a template's file, and the template; in transformers' order."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.name, file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        template = read_json(file, huge_integers=True).get("chat_template") if file.exists() else None
        if isinstance(template, list):  # named ones
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return name, template
    return None


def _render(template: str, conversations: list[Any], values: dict[str, str]) -> list[str] | str:
    """The texts, or why there are none."""
    given = json.dumps({"template": template, "conversations": conversations, "values": values})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", RENDER], input=given, capture_output=True, text=True, timeout=SECONDS
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"it takes more than {SECONDS:g} seconds"
    except ValueError:
        return f"the process ended with {done.returncode}"
    texts: list[str] | str = answer.get("texts") or str(answer.get("error"))
    return texts


def _difference(text: str, conversation: list[dict[str, Any]], spec: PromptSpec) -> str:
    """The first difference of a rendered conversation, as a clause; empty where there is none."""
    messages = [Message.from_dict(message) for message in conversation]
    ours = str(format_chat(messages, spec.system_prompt, spec.template))
    if text == ours:
        return ""
    pairs = enumerate(zip_longest(text, ours))
    start = max(next(place for place, (theirs, own) in pairs if theirs != own) - CONTEXT, 0)
    stop = start + 2 * CONTEXT
    return f"it writes {text[start:stop]!r} where the built-in prompt has {ours[start:stop]!r}"
