"""Text goldens: token ids of texts and texts of token ids, from a checkpoint's own files.

``goldens/text.json`` of a bundle holds conversations with their token ids, answers with their text,
the settings of the prompt, and digests of the parts of ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle.files import read_json, sha256_of_text
from runtimes.errors import UserError
from runtimes.text.prompt import IMAGE, Message, format_chat, place_images
from runtimes.text.tokenizer import Tokenizer, expand_images

TEXT_GOLDENS = "text.json"
BLOCK = 256  # tokens that share a digest
DIGITS = 16  # of a digest
SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Conversation:
    """Messages and the number of their images."""

    messages: tuple[Message, ...]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return the object for JSON."""
        return {"messages": list(map(_message, self.messages)), "images": self.images}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Conversation:
        """Read the result of ``to_dict``."""
        return cls(tuple(map(Message.from_dict, raw["messages"])), int(raw["images"]))


def _message(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [
        {"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in message.content
    ]
    return {"role": message.role, "content": parts}


@dataclass(frozen=True)
class TextGoldens:
    """Recorded results of a tokenizer and its prompt settings.

    Args:
        conversations: the conversations.
        prompts: ids of each conversation, images expanded, BOS first.
        raw: ids of each raw prompt.
        answers: ids and their streamed text.
        prompt: the fields of ``PromptSpec``.
        vocabulary: number of ids that the model can produce.
        sections: digests of the parts of ``tokenizer.json``.
        pieces: digests of the texts of ``BLOCK`` tokens each.
        encodings: digests of the ids of those texts when they are encoded again.
    """

    conversations: tuple[Conversation, ...]
    prompts: tuple[list[int], ...]
    raw: dict[str, list[int]]
    answers: tuple[tuple[list[int], str], ...]
    prompt: dict[str, Any]
    vocabulary: int
    sections: dict[str, str]
    pieces: tuple[str, ...]
    encodings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the object for JSON."""
        conversations = [conversation.to_dict() for conversation in self.conversations]
        return {**asdict(self), "conversations": conversations}

    @classmethod
    def load(cls, file: Path) -> TextGoldens:
        """Read the goldens of a bundle.

        Raises:
            UserError: the file does not hold text goldens.
        """
        raw = read_json(file)
        try:
            return cls(
                conversations=tuple(map(Conversation.from_dict, raw["conversations"])),
                prompts=tuple(_ids(row) for row in raw["prompts"]),
                raw={str(text): _ids(row) for text, row in raw["raw"].items()},
                answers=tuple((_ids(tokens), str(text)) for tokens, text in raw["answers"]),
                prompt=dict(raw["prompt"]),
                vocabulary=int(raw["vocabulary"]),
                sections={str(name): str(digest) for name, digest in raw["sections"].items()},
                pieces=tuple(map(str, raw["pieces"])),
                encodings=tuple(map(str, raw["encodings"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError) as error:
            raise UserError(f"{file} does not hold text goldens; export the bundle again.") from error


def _ids(row: Any) -> list[int]:
    if not isinstance(row, list) or not all(type(number) is int for number in row):
        raise ValueError("token ids must be integers")
    return row


def record_texts(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    raw: Sequence[str],
    answers: Sequence[Sequence[int]],
    vocabulary: int,
) -> TextGoldens:
    """Record the results of a tokenizer.

    Args:
        tokenizer: the tokenizer with its prompt settings.
        conversations: conversations to encode.
        raw: raw prompts to encode, in which spelled control tokens count.
        answers: ids to decode as a stream.
        vocabulary: number of ids that the model can produce.
    """
    pieces = list(_blocks(tokenizer, vocabulary))
    return TextGoldens(
        conversations=tuple(conversations),
        prompts=tuple(_encode(tokenizer, conversation) for conversation in conversations),
        raw={text: tokenizer.encode(text) for text in raw},
        answers=tuple((list(tokens), _decode(tokenizer, tokens)) for tokens in answers),
        prompt=_plain(tokenizer.spec.settings()),
        vocabulary=vocabulary,
        sections=_sections(tokenizer.file),
        pieces=tuple(_digest(block) for block in pieces),
        encodings=tuple(_digest(tokenizer.encode("\n".join(block))) for block in pieces),
    )


def rerecord_texts(goldens: TextGoldens, tokenizer: Tokenizer) -> TextGoldens:
    """Record the results of another tokenizer for the same texts."""
    answers = [tokens for tokens, _ in goldens.answers]
    return record_texts(tokenizer, goldens.conversations, list(goldens.raw), answers, goldens.vocabulary)


def text_differences(actual: TextGoldens, expected: TextGoldens) -> Iterator[str]:
    """List the differences of text goldens, the most informative first.

    Yields:
        one clause per difference, for a message.
    """
    for name, theirs in expected.prompt.items():
        ours = actual.prompt.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            ours = {key: ours.get(key) for key in theirs}  # a later release may have more keys
        if ours != theirs:
            yield f"the manifest's prompt has {name} {_cut(ours)}, the reference has {_cut(theirs)}"
    for name in sorted(actual.sections.keys() | expected.sections.keys()):
        if actual.sections.get(name) != expected.sections.get(name):
            yield f"the {name} of tokenizer.json differs from the checkpoint's"
    for conversation, ours, theirs in zip(
        expected.conversations, actual.prompts, expected.prompts, strict=True
    ):
        if ours != theirs:
            yield _tokens_differ(f"the conversation {_cut(conversation.messages[-1].content)}", ours, theirs)
    for text, theirs in expected.raw.items():
        if actual.raw[text] != theirs:
            yield _tokens_differ(f"the text {_cut(text)}", actual.raw[text], theirs)
    for (tokens, ours), (_, theirs) in zip(actual.answers, expected.answers, strict=True):
        if ours != theirs:
            yield f"the tokens {tokens[:8]} decode to {_cut(ours)}, in the reference to {_cut(theirs)}"
    for what, ours, theirs in (
        ("have other texts", actual.pieces, expected.pieces),
        ("have texts that are encoded differently", actual.encodings, expected.encodings),
    ):
        if ours != theirs:
            places = [
                place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]
            ]
            first = BLOCK * (places[0] if places else min(len(ours), len(theirs)))
            yield f"tokens between {first} and {first + BLOCK - 1} {what}"


def _tokens_differ(what: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
    place = same if same >= 0 else min(len(ours), len(theirs))
    return f"{what} has other tokens from position {place} on"


def _encode(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    spec = tokenizer.spec
    placed = place_images(conversation.messages, conversation.images)
    ids = tokenizer.encode(format_chat(placed, spec.system_prompt, spec.template))
    return [int(number) for number in expand_images(ids, spec, conversation.images)]


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.push, tokens), stream.flush()])


def _blocks(tokenizer: Tokenizer, vocabulary: int) -> Iterator[list[str]]:
    for first in range(0, vocabulary, BLOCK):
        yield tokenizer.pieces(range(first, min(first + BLOCK, vocabulary)))


def _sections(file: Path) -> dict[str, str]:
    """Digest the parts of ``tokenizer.json``; the order of its keys does not matter."""
    raw = read_json(file)
    model = raw.pop("model", None)
    parts = dict(model) if isinstance(model, dict) else {"model": model}
    large = {name: parts.pop(name) for name in ("vocab", "merges") if name in parts}
    return {name: _digest(part) for name, part in {**raw, **large, "model": parts}.items()}


def _digest(value: Any) -> str:
    return sha256_of_text(json.dumps(value, sort_keys=True))[:DIGITS]


def _plain(value: Any) -> Any:
    """Return a value as read back from JSON."""
    return json.loads(json.dumps(value))


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
