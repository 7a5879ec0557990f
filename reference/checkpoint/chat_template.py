"""Comparison of a checkpoint's own chat template with the built-in prompt format.

The runtime always uses the built-in format; a checkpoint's ``chat_template`` (Jinja, rendered as
transformers does) is only compared with it. A checkpoint is untrusted input, so the template is
rendered in jinja2's sandbox, in a separate process that ends after ``RENDER_TIMEOUT_SECONDS``.
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

RENDER_TIMEOUT_SECONDS = 20.0
QUOTED_CHARACTERS = 24  # before and after the start of the first difference
# Conversations in the form that transformers' multimodal templates take.
TEXT_MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
IMAGE_MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
MULTIPART_MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two?"}]}
]
MULTITURN_MESSAGES: list[dict[str, Any]] = [
    *IMAGE_MESSAGES,
    {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which color?"}]},
]
LATE_SYSTEM_MESSAGES = [
    *MULTITURN_MESSAGES[:2],
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    MULTITURN_MESSAGES[2],
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    TEXT_MESSAGES,
    IMAGE_MESSAGES,
    MULTITURN_MESSAGES,
    MULTIPART_MESSAGES,
    LATE_SYSTEM_MESSAGES,
]
# In the form that templates of text models take: the content of a message is one string.
PLAIN_TEXT_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{**message, "content": message["content"][0]["text"]} for message in messages]
    for messages in (TEXT_MESSAGES, [*TEXT_MESSAGES, *MULTITURN_MESSAGES[1:]])
]

RENDER_SCRIPT = """
import json, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

def raise_exception(message):
    raise ValueError(message)

request = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.globals["raise_exception"] = raise_exception
try:
    template = environment.from_string(request["template"])
    texts = [template.render(messages=messages, add_generation_prompt=True, **request["values"])[:20000]
             for messages in request["conversations"]]
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
else:
    print(json.dumps({"texts": texts}))
"""


def describe_template_difference(checkpoint: Checkpoint, spec: PromptSpec) -> str:
    """Describe in one sentence how a checkpoint's chat template differs from the built-in prompt.

    Args:
        checkpoint: its folder may hold a chat template.
        spec: the built-in prompt format with the checkpoint's special tokens.

    Returns:
        The sentence; empty if there is no difference, or no chat template.
    """
    named_template = _find_template(checkpoint.folder)
    if named_template is None:
        return ""
    name, template = named_template
    if importlib.util.find_spec("jinja2") is None:
        return f"The chat template in {name} was not compared with the built-in prompt: pip install jinja2."
    tokenizer = Tokenizer(checkpoint.tokenizer_files[0], spec)
    bos, eos = tokenizer.pieces([spec.bos_id, spec.eos_id])
    values = {"bos_token": bos, "eos_token": eos}
    differences: list[str] = []
    errors: list[str] = []
    for conversations in (CONVERSATIONS, PLAIN_TEXT_CONVERSATIONS):
        rendered = _render_conversations(template, conversations, values)
        if isinstance(rendered, str):
            errors.append(f"it cannot be evaluated ({rendered})")
            continue
        texts = [text.removeprefix(bos).replace(eos, EOS).strip() for text in rendered]
        described = [
            _describe_first_difference(text, conversation, spec)
            for text, conversation in zip(texts, conversations, strict=True)
        ]
        if not any(described):
            return ""
        differences += filter(None, described)
    reason = [*differences, *errors][0]
    return f"The chat template in {name} differs from the built-in prompt, which is used: {reason}."


def _find_template(folder: Path) -> tuple[str, str] | None:
    """Find the template as transformers does; returns the file name and the template."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.name, file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        template = read_json(file, huge_integers=True).get("chat_template") if file.exists() else None
        if isinstance(template, list):  # several named templates
            by_name = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = by_name.get("default")
        if isinstance(template, str):
            return name, template
    return None


def _render_conversations(template: str, conversations: list[Any], values: dict[str, str]) -> list[str] | str:
    """Render all conversations; returns their texts, or the reason why that failed."""
    request = json.dumps({"template": template, "conversations": conversations, "values": values})
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", RENDER_SCRIPT],
            input=request,
            capture_output=True,
            text=True,
            timeout=RENDER_TIMEOUT_SECONDS,
        )
        answer = json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        return f"it takes more than {RENDER_TIMEOUT_SECONDS:g} seconds"
    except ValueError:
        return f"the process ended with exit code {process.returncode}"
    texts: list[str] | str = answer.get("texts") or str(answer.get("error"))
    return texts


def _describe_first_difference(text: str, conversation: list[dict[str, Any]], spec: PromptSpec) -> str:
    """Describe in a clause where a rendered conversation first differs; empty if it does not."""
    messages = [Message.from_dict(message) for message in conversation]
    built_in = str(format_chat(messages, spec.system_prompt, spec.template))
    if text == built_in:
        return ""
    pairs = enumerate(zip_longest(text, built_in))
    start = max(next(index for index, (theirs, ours) in pairs if theirs != ours) - QUOTED_CHARACTERS, 0)
    stop = start + 2 * QUOTED_CHARACTERS
    return f"it renders {text[start:stop]!r} where the built-in prompt has {built_in[start:stop]!r}"
