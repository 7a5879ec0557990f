"""DeepSeek-VL's prompt format, as the original's ``deepseek`` conversation template writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
ROLES = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Message:
    """One turn; ``<image_placeholder>`` in the text stands where an image goes."""

    role: Literal["user", "assistant"]
    content: str

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Message:
        """Of ``{"role": …, "content": …}``; raises UserError on any other form."""
        role = str(raw.get("role", "")).lower() if isinstance(raw, Mapping) else ""
        if role not in ROLES or not isinstance(raw.get("content"), str):
            raise UserError(f"A message needs role 'user' or 'assistant' and a text as content, got {raw!r}.")
        return cls("user" if role == "user" else "assistant", raw["content"])


def format_chat(messages: Sequence[Message], system: str = SYSTEM_PROMPT) -> str:
    """The text of a conversation, with an open ``Assistant:`` after a last user turn.

    ``{system}\\n\\nUser: {text}\\n\\nAssistant: {text}<EOS>User: ...``; BOS is not part of the text.
    """
    text = f"{system}\n\n" if system else ""
    for message in messages:
        content = message.content.strip()
        end = "\n\n" if message.role == "user" else EOS
        # An empty message has no separator after it, as in the original.
        text += f"{ROLES[message.role]}: {content}{end}" if content else f"{ROLES[message.role]}:"
    if messages and messages[-1].role == "user":
        text += f"{ROLES['assistant']}:"
    return text
