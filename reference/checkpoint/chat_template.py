"""A checkpoint's own chat template: found, rendered in a sandbox, and used if it differs.

A checkpoint is untrusted input, so its template (Jinja, rendered as transformers does) runs in
jinja2's sandbox, in a separate process with limits of time and memory, and only at export: a bundle
has the texts between the messages (``ChatTemplate``), which ``derived_template`` finds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.derived_template import (
    CannotDeriveError,
    Rendering,
    check_template,
    derive_template,
    describe_first_difference,
    probes,
    sample_conversations,
)
from reference.checkpoint.text_files import BUILT_IN_HINT, find_chat_template
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.text.control_tokens import is_control_token
from runtimes.text.prompt import EOS, IMAGE_PLACEHOLDER, Message, format_chat
from runtimes.text.tokenizer import PromptSpec, Tokenizer
from runtimes.text.tokenizer_file import read_tokenizer

RENDER_TIMEOUT_SECONDS = 20.0
RENDER_MEMORY = 1 << 30  # bytes of the process
MAX_TEMPLATE = 1 << 20  # characters
CHAT_TEMPLATES = ("checkpoint", "built-in")  # choices of the user
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

# Filters and tags are those of transformers' ``_compile_jinja_template``. ``strftime_now`` is not
# defined, since a bundle cannot write the date.
RENDER_SCRIPT = """
import json, sys
limit, *folders = sys.argv[1:]
sys.path += folders
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
except (ImportError, ValueError, OSError):
    pass  # a system without this limit
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def raise_exception(message):
    raise ValueError(message)

def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

def describe(error):
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    return f"{type(error).__name__}: {error}"[:300]

request = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
rows = []
try:
    template = environment.from_string(request["template"])
except (Exception, RecursionError) as error:
    print(json.dumps({"error": describe(error)}))
    sys.exit()
for messages, prompt in request["conversations"]:
    try:
        values = {"tools": None, "documents": None, **request["values"]}
        text = template.render(messages=messages, add_generation_prompt=prompt, **values)
        rows.append({"text": text[:20000]})
    except Exception as error:
        rows.append({"error": describe(error)})
print(json.dumps({"rows": rows}))
"""


@dataclass(frozen=True)
class _Source:
    """A chat template and what it is rendered with; equal sources give equal prompts.

    Attributes:
        name: its file.
        template: Jinja.
        values: special tokens by the names that transformers passes.
        tokenizer: ``tokenizer.json``.
        adds_bos: whether the tokenizer itself puts BOS before a text.
        prefix: what precedes the text of the template in a prompt.
        vocabulary: number of tokens that the model has.
    """

    name: str
    template: str
    values: tuple[tuple[str, str], ...]
    tokenizer: Path
    adds_bos: bool
    prefix: str
    vocabulary: int


def wants_built_in(choice: str | None) -> bool:
    """Whether a user chose the built-in prompt format; None is the checkpoint's own.

    Raises:
        UserError: there is no such choice.
    """
    if choice not in (None, *CHAT_TEMPLATES):
        raise UserError(f"The chat template must be {' or '.join(CHAT_TEMPLATES)}, got {choice!r}.")
    return choice == "built-in"


def choose_prompt(
    checkpoint: Checkpoint, built_in: PromptSpec, prefix: str = "", processor_prefix: str = ""
) -> PromptSpec:
    """Return the prompt format of a checkpoint: its own chat template, if that differs.

    Args:
        checkpoint: its folder may hold a chat template; ``built_in_prompt`` chooses the built-in
            format, and the difference is only noted.
        built_in: the built-in prompt format with the checkpoint's special tokens.
        prefix: what precedes the text of a template that writes the turns of the built-in format.
        processor_prefix: what the model's processor writes before the text of any template.

    Raises:
        UserError: the template cannot be rendered, or cannot be written as texts between messages.
    """
    named_template = find_chat_template(checkpoint.folder, checkpoint.built_in_prompt)
    if named_template is None:
        return built_in
    name, template = named_template
    if importlib.util.find_spec("jinja2") is None:
        if checkpoint.built_in_prompt:
            return built_in
        raise UserError(
            f"The chat template in {checkpoint.folder / name} needs jinja2: pip install jinja2; or"
            f" {BUILT_IN_HINT}."
        )
    file = checkpoint.tokenizer_files[0]
    source = _Source(
        name,
        template,
        _special_tokens(checkpoint.folder, file, built_in),
        file,
        _adds_bos(checkpoint, built_in),
        prefix,
        checkpoint.config.decoder.vocab_size,
    )
    try:
        difference = _difference_from_built_in(source, built_in)
        if difference and not checkpoint.built_in_prompt:
            return _own_prompt(replace(source, prefix=processor_prefix), built_in)
    except CannotDeriveError as error:
        if not checkpoint.built_in_prompt:
            raise UserError(
                f"The chat template in {checkpoint.folder / name} cannot be used: {error}; {BUILT_IN_HINT}."
            ) from error
        difference = str(error)
    if difference:
        difference = (
            f"The chat template in {name} differs from the built-in prompt, which is used: {difference}."
        )
    return replace(built_in, template_difference=difference)


def _special_tokens(folder: Path, file: Path, spec: PromptSpec) -> tuple[tuple[str, str], ...]:
    """Return the special tokens that transformers passes to a template."""
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, huge_integers=True) if settings_file.exists() else {}
    extra = settings.get("extra_special_tokens")
    values: dict[str, str] = {}
    for key, token in {**settings, **(extra if isinstance(extra, dict) else {})}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if str(key).endswith("_token") and isinstance(text, str):
            values[str(key)] = text
    bos, eos = Tokenizer(file, spec).pieces([spec.bos_id, spec.eos_id])
    return tuple(sorted({**values, "bos_token": bos, "eos_token": eos}.items()))


def _adds_bos(checkpoint: Checkpoint, spec: PromptSpec) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    file = checkpoint.folder / "tokenizer_config.json"
    if file.exists() and read_json(file, huge_integers=True).get("add_bos_token"):
        return True
    return read_tokenizer(checkpoint.tokenizer_files[0]).encode("a").ids[:1] == [spec.bos_id]


@lru_cache(maxsize=8)
def _difference_from_built_in(source: _Source, spec: PromptSpec) -> str:
    """Describe in a clause how the template differs from the built-in prompt; empty if equal.

    Raises:
        CannotDeriveError: no conversation can be rendered.
    """
    values = dict(source.values)
    bos, eos = values["bos_token"], values["eos_token"]
    differences: list[str] = []
    errors: list[str] = []
    for conversations in (CONVERSATIONS, PLAIN_TEXT_CONVERSATIONS):
        try:
            rendered = [row.require() for row in _render(source, [(item, True) for item in conversations])]
        except CannotDeriveError as error:
            if error.rank == 3:
                raise
            errors.append(str(error))
            continue
        texts = [f"{source.prefix}{text.removeprefix(bos).replace(eos, EOS).strip()}" for text in rendered]
        built_in = [
            str(format_chat([*map(Message.from_dict, messages)], spec.system_prompt, spec.template))
            for messages in conversations
        ]
        described = [
            describe_first_difference(*pair)
            for pair in zip(texts, built_in, strict=True)
            if len(set(pair)) > 1
        ]
        if not described:
            return ""
        reads_lists = conversations is CONVERSATIONS and "'type'" not in rendered[1]
        if reads_lists and IMAGE_PLACEHOLDER in rendered[1]:
            return described[0]  # the template places images, so its form for texts alone does not count
        differences += described
    return [*differences, *errors][0]


@lru_cache(maxsize=8)
def _own_prompt(source: _Source, built_in: PromptSpec) -> PromptSpec:
    """Write the template as a prompt format.

    Raises:
        CannotDeriveError: that is not possible.
    """
    raw = json.loads(read_tokenizer(source.tokenizer).to_str())
    tokens = [token for token in raw.get("added_tokens") or [] if is_control_token(token)]
    names = {str(token["content"]): int(token["id"]) for token in tokens}
    bos = dict(source.values)["bos_token"]
    errors = []
    for lists in (True, False):
        requests = probes(lists)
        try:
            rendered = _render(source, list(requests.values()), bos)
            rows = dict(zip(requests, rendered, strict=True))
            derived = derive_template(rows, lists, bos, list(names))
            texts = derived.template.texts()
            template = replace(
                derived.template,
                control_tokens=tuple(name for name in sorted(names) if any(name in text for text in texts)),
            )
            for name in template.control_tokens:
                if names[name] >= source.vocabulary:
                    raise CannotDeriveError(
                        f"its token {name!r} has the id {names[name]}, outside the model's vocabulary"
                    )
            ends = [
                names[name] for name in template.control_tokens if template.assistant_end.startswith(name)
            ]
            spec = replace(
                built_in,
                system_prompt=derived.system_prompt,
                eos_ids=tuple(dict.fromkeys([*built_in.eos_ids, *ends])),
                add_bos=derived.begins_with_bos or source.adds_bos,
                template=template,
            )
        except CannotDeriveError as error:
            errors.append(error)
            continue
        conversations = sample_conversations(spec.template, lists)
        rendered = _render(source, [(messages, True) for messages in conversations], bos)
        check_template(rendered, conversations, Tokenizer(source.tokenizer, spec), bos)
        return spec
    raise max(errors, key=lambda error: error.rank)


def _render(source: _Source, requests: list[tuple[Any, bool]], bos: str | None = None) -> list[Rendering]:
    """Render conversations, each with or without the start of an answer.

    Args:
        source: the template.
        requests: the conversations.
        bos: put the processor's prefix after this, or at the start; None leaves it out.

    Raises:
        CannotDeriveError: the template is not valid, or exceeds a limit.
    """
    if len(source.template) > MAX_TEMPLATE:
        raise CannotDeriveError(
            f"it has {len(source.template)} characters, at most {MAX_TEMPLATE} are read", 3
        )
    request = json.dumps(
        {"template": source.template, "conversations": requests, "values": dict(source.values)}
    )
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", RENDER_SCRIPT, str(RENDER_MEMORY), *_package_folders()],
            input=request,
            capture_output=True,
            text=True,
            timeout=RENDER_TIMEOUT_SECONDS,
        )
        answer: Mapping[str, Any] = json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        raise CannotDeriveError(f"it takes more than {RENDER_TIMEOUT_SECONDS:g} seconds", 3) from None
    except ValueError:
        raise CannotDeriveError(f"its process ended with exit code {process.returncode}", 3) from None
    if "error" in answer:
        raise CannotDeriveError(f"it cannot be evaluated ({answer['error']})", 3)
    texts = [row.get("text") for row in answer["rows"]]
    if bos is not None:
        texts = [text and _with_prefix(text, source.prefix, bos) for text in texts]
    return [Rendering(text, row.get("error", "")) for text, row in zip(texts, answer["rows"], strict=True)]


def _package_folders() -> list[str]:
    """Return where jinja2 and what it needs are; an isolated process does not know all places."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]


def _with_prefix(text: str, prefix: str, bos: str) -> str:
    start = bos if text.startswith(bos) else ""
    return f"{start}{prefix}{text[len(start) :]}"
