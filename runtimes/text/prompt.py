"""The prompt format: a conversation and a chat template become a prompt.

The default template is the ``deepseek`` conversation template of the original code of DeepSeek-VL.

A conversation becomes a ``PromptText``: text that records which of its parts are control tokens.
The content of a user's message, the system prompt or an earlier answer is always text, even if it
spells a control token. The words ``User:`` and ``Assistant:`` are plain text in the default format,
so a message can contain them; it cannot contain the end-of-sentence token that separates an answer
from the next message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile
from typing import Any, Literal, Union

from runtimes.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE_PLACEHOLDER = "<image_placeholder>"
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
ROLES = {"user": "User", "assistant": "Assistant", "system": "System"}


class Control(Enum):
    """A control token of a prompt; the value is its spelling in raw prompts."""

    IMAGE = IMAGE_PLACEHOLDER
    EOS = EOS


@dataclass(frozen=True)
class TemplateToken:
    """A control token that a chat template names, such as ``<|User|>``."""

    value: str  # its spelling


IMAGE: Literal[Control.IMAGE] = Control.IMAGE  # the part of a message at the position of an image
Part = Union[str, Literal[Control.IMAGE]]
Piece = Union[str, Control, TemplateToken]


@dataclass(frozen=True)
class ChatTemplate:
    """Texts between the messages of a conversation, as stored in a bundle's manifest.

    Each message is ``{role}{content}{role_end}``. Where one of these texts spells the
    end-of-sentence token or one of ``control_tokens``, it is that token, not text. A message
    without content is ``{role}`` without trailing white space.

    Args:
        system: start of the system prompt.
        system_end: end of the system prompt.
        user: start of a user's message.
        user_end: end of a user's message.
        assistant: start of an assistant's message.
        assistant_end: end of an assistant's message.
        later_system: start of a system message that follows other messages.
        later_system_end: end of a system message that follows other messages.
        answer: end of a prompt, which the model continues.
        text_separator: separator of consecutive text parts of one message.
        before_image: text between an image and the part before it in a message.
        after_image: text between an image and the part after it in a message.
        control_tokens: added tokens of the tokenizer that these texts spell, such as ``<|User|>``.
    """

    system: str = ""
    system_end: str = "\n\n"
    user: str = "User: "
    user_end: str = "\n\n"
    assistant: str = "Assistant: "
    assistant_end: str = EOS
    later_system: str = "System: "
    later_system_end: str = EOS
    answer: str = "Assistant:"
    text_separator: str = " "
    before_image: str = ""
    after_image: str = ""
    control_tokens: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ChatTemplate:
        """Read the validated object of a manifest; earlier releases have fewer keys."""
        return cls(**{**raw, "control_tokens": tuple(raw.get("control_tokens", ()))})

    def pieces(self, text: str) -> list[Piece]:
        """Split one of the template's own texts into texts and control tokens."""
        names = sorted((EOS, *self.control_tokens), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [
            part if place % 2 == 0 else Control.EOS if part == EOS else TemplateToken(part)
            for place, part in enumerate(parts)
            if part
        ]

    def between(self, before: Part, after: Part) -> str:
        """Return the text between two consecutive parts of a message."""
        if before is not IMAGE and after is not IMAGE:
            return self.text_separator
        return (self.after_image if before is IMAGE else "") + (self.before_image if after is IMAGE else "")

    def role(self, role: str) -> tuple[str, str]:
        """Return the start and end of a message of ``role``."""
        return {
            "user": (self.user, self.user_end),
            "assistant": (self.assistant, self.assistant_end),
            "system": (self.later_system, self.later_system_end),
        }[role]


TEMPLATE = ChatTemplate()


class PromptText(str):
    """A prompt whose ``pieces`` distinguish control tokens from text that spells them.

    ``Tokenizer.encode`` encodes the pieces: control tokens become their ids, the rest is text. A
    string that is sliced or joined from it is a raw prompt, in which spelled control tokens count.
    """

    pieces: tuple[Piece, ...]

    def __new__(cls, pieces: Iterable[Piece]) -> PromptText:
        """Join the pieces."""
        pieces = tuple(pieces)
        text = super().__new__(cls, "".join(p if isinstance(p, str) else p.value for p in pieces))
        text.pieces = pieces
        return text

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Return the arguments of ``__new__``, for pickle."""
        return (self.pieces,)


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: the author of the message.
        content: a text, or a sequence of texts and ``IMAGE`` parts. Texts are never read as control
            tokens; ``place_images`` defines when ``<image_placeholder>`` in a user's text is an
            image.
        inline_images: whether the text places its images with ``<image_placeholder>``; then the
            template adds no text before or after an image.
    """

    role: Literal["user", "assistant", "system"]
    content: Union[str, Sequence[Part]]
    inline_images: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Message:
        """Read a message from ``{"role": …, "content": …}``.

        The content is a text or a list of ``{"type": "text", "text": …}`` and
        ``{"type": "image"}``.

        Raises:
            UserError: the message has any other form.
        """
        role = str(raw.get("role", "")).lower() if isinstance(raw, Mapping) else ""
        content = raw.get("content") if isinstance(raw, Mapping) else None
        if isinstance(content, (list, tuple)):
            content = tuple(map(_part, content))
        if role not in ROLES or content is None or not isinstance(content, (str, tuple)):
            raise UserError(
                "A message needs role 'user', 'assistant' or 'system' and a text or a list of parts as"
                f" content, got {raw!r}."
            )
        message = cls("user" if role == "user" else "assistant" if role == "assistant" else "system", content)
        if message.images and role != "user":
            raise UserError(f"Only user messages can have images, got a message of role {role!r}.")
        return message

    @classmethod
    def from_parts(cls, role: Literal["user", "assistant", "system"], parts: Sequence[Part]) -> Message:
        """Create a message of several parts; if all are texts, join them like the chat template."""
        texts = [part for part in parts if isinstance(part, str)]
        return cls(role, TEMPLATE.text_separator.join(texts) if len(texts) == len(parts) else tuple(parts))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as a tuple of parts."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def images(self) -> int:
        """Number of image parts."""
        return sum(part is IMAGE for part in self.parts)


def _part(raw: Any) -> Part:
    if isinstance(raw, str):
        return raw
    kind = raw.get("type") if isinstance(raw, Mapping) else None
    if raw is IMAGE or kind == "image":
        return IMAGE
    if kind == "text" and isinstance(raw.get("text"), str):
        return str(raw["text"])
    raise UserError(f"A part of a message must be a text or an image, got {raw!r}.")


def place_images(messages: Sequence[Message], images: int) -> list[Message]:
    """Turn ``<image_placeholder>`` in the texts of users into image parts, for ``images`` images.

    Messages that already have image parts are not changed. Otherwise each placeholder in a user's
    text is the position of an image if there are as many as images. Without placeholders, the
    images come before the text of the first user message. Without images, a placeholder is text.

    Raises:
        UserError: the number of positions differs from the number of images.
    """
    placed = sum(message.images for message in messages)
    spelled = sum(
        message.content.count(IMAGE_PLACEHOLDER)
        for message in messages
        if message.role == "user" and isinstance(message.content, str)
    )
    if placed == images:
        return list(messages)
    if placed or spelled not in (0, images):
        raise UserError(
            f"The messages have {placed or spelled} {IMAGE_PLACEHOLDER} but {images} images were passed;"
            " pass one image per placeholder, or none to use the placeholder as text."
        )
    result = list(messages)
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise UserError("Images need a user message, but the conversation has none.")
    if not spelled:
        first = result[users[0]]
        result[users[0]] = replace(first, content=(*[IMAGE] * images, *first.parts))
        return result
    for place in users:
        content = result[place].content
        if isinstance(content, str) and IMAGE_PLACEHOLDER in content:
            before, *texts = content.split(IMAGE_PLACEHOLDER)
            parts = [before, *(part for text in texts for part in (IMAGE, text))]
            content = tuple(part for part in parts if part)
            result[place] = replace(result[place], content=content, inline_images=True)
    return result


def format_chat(
    messages: Sequence[Message], system: str = SYSTEM_PROMPT, template: ChatTemplate = TEMPLATE
) -> PromptText:
    r"""Format a conversation; after a last user message, it ends with an open ``Assistant:``.

    The default format is ``{system}\n\nUser: {text}\n\nAssistant: {text}<EOS>User: ...``, without
    BOS. System messages at the beginning replace ``system``; later ones become
    ``System: {text}<EOS>``, as in the chat template of transformers' conversion script. Leading
    white space is removed, since the original processor strips its prompts.
    """
    leading = list(takewhile(lambda message: message.role == "system", messages))
    if leading:
        system = "\n\n".join(_text_of(message, template) for message in leading)
    pieces: list[Piece] = []
    if system.strip():
        start, end = template.pieces(template.system), template.pieces(template.system_end)
        pieces = [*start, system if start else system.lstrip(), *end]
    for message in messages[len(leading) :]:
        pieces += _render(message, template)
    if messages and messages[-1].role == "user":
        pieces += template.pieces(template.answer)
    return PromptText(pieces)


def _render(message: Message, template: ChatTemplate) -> list[Piece]:
    start, end = template.role(message.role)
    content = _content(message, template)
    if not any(content):  # an empty message has no separator after it, as in the original
        return template.pieces(start.rstrip())
    return [*template.pieces(start), *content, *template.pieces(end)]


def _content(message: Message, template: ChatTemplate) -> list[Piece]:
    """Return texts and images of a message, without white space at its start and end."""
    parts = list(message.parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    pieces: list[Piece] = []
    for place, part in enumerate(parts):
        if place and not message.inline_images:
            pieces.append(template.between(parts[place - 1], part))
        pieces.append(part)
    return pieces


def _text_of(message: Message, template: ChatTemplate) -> str:
    return "".join(part for part in _content(message, template) if isinstance(part, str))
