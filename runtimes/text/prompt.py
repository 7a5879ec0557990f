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
from typing import Any, Literal, Optional, Union

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
        around_images: the texts before and after an image are also at the ends of a message.
        no_system: text in place of the system prompt of a conversation that has none.
        first_user: start of a user's message after the system prompt or ``no_system``; None is
            ``user``.
        stripped_roles: roles whose messages lose the white space at their ends.
        stripped_parts: each text of their messages loses it, also beside an image.
        joined_system: white space at the start of the first user's message stays after a system
            prompt.
        system_messages: where a conversation may have system messages; elsewhere they are refused.
        exact: messages without content keep both texts around them, white space at the start of a
            prompt stays, and of several system messages only the first is the system prompt. This
            is how templates in Jinja work.
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
    around_images: bool = False
    no_system: str = ""
    first_user: Optional[str] = None
    stripped_roles: tuple[str, ...] = tuple(ROLES)
    stripped_parts: bool = False
    joined_system: bool = False
    system_messages: Literal["anywhere", "first", "none"] = "anywhere"
    exact: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ChatTemplate:
        """Read the validated object of a manifest; earlier releases have fewer keys."""
        lists = {key: tuple(raw[key]) for key in ("control_tokens", "stripped_roles") if key in raw}
        return cls(**{**raw, **lists})

    def texts(self) -> list[str]:
        """Return all texts of the template."""
        return [text for text in vars(self).values() if isinstance(text, str)]

    def supports(self, messages: Sequence[Message]) -> bool:
        """Whether the template has a place for every system message of a conversation."""
        places = [place for place, message in enumerate(messages) if message.role == "system"]
        return self.system_messages == "anywhere" or all(
            place == 0 and self.system_messages == "first" for place in places
        )

    def pieces(self, text: str) -> list[Piece]:
        """Split one of the template's own texts into texts and control tokens."""
        names = sorted((EOS, *self.control_tokens), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ends = {EOS}.difference(self.control_tokens)
        return [
            part if place % 2 == 0 else Control.EOS if part in ends else TemplateToken(part)
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
        """Create a message of several parts; texts are joined like the chat template."""
        return cls(role, parts[0] if len(parts) == 1 and isinstance(parts[0], str) else tuple(parts))

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
    if not template.supports(messages):
        where = "other than the first" if template.system_messages == "first" else ""
        raise UserError(
            f"The chat template of this model has no system messages{' ' * bool(where)}{where};"
            " put the text into a user message."
        )
    leading = list(takewhile(lambda message: message.role == "system", messages))
    if template.exact:
        leading = leading[:1]
    if leading:
        system = "\n\n".join(_text_of(message, template) for message in leading)
    pieces: list[Piece] = template.pieces(template.no_system)
    if system.strip() or (template.exact and leading):
        start, end = template.pieces(template.system), template.pieces(template.system_end)
        pieces = [*start, system if start or template.exact else system.lstrip(), *end]
    for place, message in enumerate(messages[len(leading) :]):
        pieces += _render(message, template, place == 0, bool(leading))
    if messages and messages[-1].role == "user":
        pieces += template.pieces(template.answer)
    return PromptText(piece for piece in pieces if piece != "")


def _render(message: Message, template: ChatTemplate, first: bool, after_system: bool) -> list[Piece]:
    start, end = template.role(message.role)
    if first and message.role == "user" and template.first_user is not None:
        start = template.first_user
    content = _content(message, template, first and after_system and template.joined_system)
    if not any(content) and not template.exact:
        return template.pieces(start.rstrip())  # no separator after it, as in the original
    return [*template.pieces(start), *content, *template.pieces(end)]


def _content(message: Message, template: ChatTemplate, keeps_start: bool = False) -> list[Piece]:
    """Return texts and images of a message, without the white space that the template removes."""
    parts = list(message.parts)
    if message.role in template.stripped_roles and template.stripped_parts:
        parts = [part if part is IMAGE else part.strip() for part in parts]
    elif message.role in template.stripped_roles:
        if parts and isinstance(parts[0], str) and not keeps_start:
            parts[0] = parts[0].lstrip()
        if parts and isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip()
    pieces: list[Piece] = []
    for place, part in enumerate(parts):
        if place and not message.inline_images:
            pieces.append(template.between(parts[place - 1], part))
        pieces.append(part)
    if template.around_images and parts and not message.inline_images:
        before, after = parts[0] is IMAGE, parts[-1] is IMAGE
        return [template.before_image * before, *pieces, template.after_image * after]
    return pieces


def _text_of(message: Message, template: ChatTemplate) -> str:
    return "".join(part for part in _content(message, template) if isinstance(part, str))
