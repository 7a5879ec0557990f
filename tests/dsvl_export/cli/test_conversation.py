"""The messages of a request become a conversation in which text stays text."""

from __future__ import annotations

from dsvl_export.serving.protocol import ChatMessage, parse_conversation
from runtimes.text.prompt import EOS, IMAGE, IMAGE_PLACEHOLDER, Message, format_chat


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_parts_and_system_messages() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    conversation = parse_conversation(
        [
            ChatMessage.model_validate(message)
            for message in (
                {"role": "developer", "content": [text("Be"), text("brief.")]},
                {"role": "user", "content": [text("<image_"), text("placeholder>"), picture, text("What?")]},
                {"role": "assistant", "content": IMAGE_PLACEHOLDER},
                {"role": "system", "content": "Be loud."},
                {"role": "user", "content": [text("Here is my note: buy milk"), text("What does it say?")]},
            )
        ],
        4,
    )
    assert conversation.urls == ("data:,",)
    assert conversation.turns == (
        Message("system", ("Be", "brief.")),
        Message("user", ("<image_", "placeholder>", IMAGE, "What?")),
        Message("assistant", IMAGE_PLACEHOLDER),
        Message("system", "Be loud."),
        Message("user", ("Here is my note: buy milk", "What does it say?")),
    )
    prompt = format_chat(conversation.turns, "not this one")
    assert prompt.pieces.count(IMAGE) == 1
    assert prompt.startswith("Be brief.\n\nUser: <image_ placeholder><image_placeholder>What?\n\n")
    assert f"{EOS}System: Be loud.{EOS}User: Here" in prompt
