"""A chat template in Jinja, written as texts between messages and checked on conversations.

Conversations of unique markers are rendered; what lies between the markers are the fields of a
``ChatTemplate``. Then both render many other conversations: a template that does anything else than
put texts between messages gives a difference.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any, Literal

from runtimes.text.prompt import IMAGE_PLACEHOLDER, ChatTemplate, Message, format_chat
from runtimes.text.tokenizer import Tokenizer

QUOTED_CHARACTERS = 24  # before and after the start of the first difference
CHECKED_CONVERSATIONS = 40
SYSTEM, USER, ANSWER, AGAIN = "sYs7qx", "uSr3vk", "aNs9zt", "aGn5wp"  # markers
PAD = "  "  # white space around a marker
TEXTS = (
    "Describe the picture.", "它是什么颜色的？", "a  b\n\nc\td", "{{ x }} {% y %} {z}", "12345 3.14", "🙂 é",
    "  with white space around  ", "\nlines\n", "User: x\n\nAssistant: y", "'quotes' \"and\" `more` & <tags>",
)  # fmt: skip

REASONING = "<think>\nIt is a cat.\n</think>\n\nA cat."  # some templates cut this out of earlier answers


class CannotDeriveError(Exception):
    """A template cannot be rendered or written as texts; the message is a clause.

    Attributes:
        rank: of two errors, the higher one is reported: 0 if messages have another form, 1 if the
            template fails on one, 2 if it writes something else, 3 if it fails on all messages.
    """

    def __init__(self, message: str, rank: int = 2) -> None:
        """Keep the clause."""
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Rendering:
    """The text of a rendered conversation, or why it could not be rendered."""

    text: str | None
    error: str = ""

    def require(self) -> str:
        """Return the text.

        Raises:
            CannotDeriveError: there is none.
        """
        if self.text is None:
            raise CannotDeriveError(f"it cannot be evaluated ({self.error})", rank=1)
        return self.text


@dataclass(frozen=True)
class DerivedTemplate:
    """A template and the system prompt of conversations without one of their own.

    ``begins_with_bos`` tells whether the template itself writes BOS.
    """

    template: ChatTemplate
    system_prompt: str
    begins_with_bos: bool


def probes(lists: bool) -> dict[str, tuple[list[dict[str, Any]], bool]]:
    """Return the conversations of markers by name, each with whether an answer follows.

    Args:
        lists: whether the content of a message is a list of parts, or one string.
    """
    user, answer, again, system = (
        _message(role, text, lists)
        for role, text in (("user", USER), ("assistant", ANSWER), ("user", AGAIN), ("system", SYSTEM))
    )
    padded = [
        _message(role, f"{PAD}{text}{PAD}", lists)
        for role, text in (("system", SYSTEM), ("user", USER), ("assistant", ANSWER), ("user", AGAIN))
    ]
    return {
        "question": ([user], True),
        "without answer": ([user], False),
        "two questions": ([user, again], True),
        "turns": ([user, answer, again], True),
        "answered": ([user, answer], False),
        "system": ([system, user], True),
        "later system": ([user, answer, system, again], True),
        "padded": (padded[1:], True),
        "padded system": (padded, True),
        "texts": ([_message("user", (USER, AGAIN), lists)], True),
        "image first": ([_message("user", (None, USER), lists)], True),
        "padded image": ([_message("user", (None, f"{PAD}{USER}{PAD}"), lists)], True),
        "image last": ([_message("user", (USER, None), lists)], True),
    }


def _message(role: str, content: str | Sequence[str | None], lists: bool) -> dict[str, Any]:
    """Return a message of a text, or of several; None is an image."""
    parts = [content] if isinstance(content, str) else list(content)
    if not lists:
        return {
            "role": role,
            "content": "".join(IMAGE_PLACEHOLDER if part is None else part for part in parts),
        }
    rows = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": rows}


def derive_template(
    rows: Mapping[str, Rendering], lists: bool, bos: str, tokens: Sequence[str] = ()
) -> DerivedTemplate:
    """Find the texts between the markers.

    Args:
        rows: the rendered ``probes``.
        lists: as for ``probes``.
        bos: the text of BOS, which is not part of a template.
        tokens: control tokens, which no text may end inside.

    Raises:
        CannotDeriveError: a conversation cannot be rendered, or lacks its markers.
    """
    question, turns = (rows[name].require() for name in ("question", "turns"))
    begins_with_bos = question.startswith(bos)
    before, opening = _cut(question.removeprefix(bos), USER)
    _, between, rest = _cut(turns, USER, ANSWER)
    next_user, _ = _cut(rest, AGAIN)
    closed, answered = (
        parts[1] if (parts := _cut_or_none(rows[name], marker)) else ""
        for name, marker in (("without answer", USER), ("answered", ANSWER))
    )
    # What precedes the first question, and also the ones after a question and after an answer.
    questions = _cut_or_none(rows["two questions"], USER, AGAIN)
    start = _common_end([before, next_user, questions[1] if questions else next_user])
    if not closed and questions:
        closed = _outside_tokens(questions[1], len(questions[1]) - len(start), tokens)
    if closed and between.startswith(closed) and opening.startswith(closed):
        user_end = closed
    else:
        user_end = _outside_tokens(between, len(_common(between, opening)), tokens)
    if answered and next_user.startswith(answered):
        assistant_end = answered
    else:
        assistant_end = _outside_tokens(next_user, len(next_user) - len(start), tokens)
    user = next_user[len(assistant_end) :]

    first_user: str | None = None
    no_system, system, system_end = before, "", ""
    system_messages: Literal["anywhere", "first", "none"] = "none"
    with_system = _cut_or_none(rows["system"], SYSTEM, USER)
    if with_system:
        system, system_end, _ = with_system
        system, system_messages = system.removeprefix(bos), "first"
    if before.endswith(user) and (not with_system or system_end.endswith(user)):
        no_system = before[: len(before) - len(user)]
        system_end = system_end[: len(system_end) - len(user)] if with_system else ""
    else:
        first_user = ""
    later = _later_system(rows["later system"], assistant_end, user)
    if with_system and later:
        system_messages = "anywhere"
    else:
        later = ("", "")
    stripped = _stripped_roles(rows)
    separator, before_image, after_image, around = " ", "", "", False
    if lists:
        separator, before_image, after_image, last = _part_texts(rows)
        around = last.endswith(opening) and last != opening
    default = _between_ends(no_system, system, system_end) if with_system else ""
    return DerivedTemplate(
        ChatTemplate(
            system=system,
            system_end=system_end,
            user=user,
            user_end=user_end,
            assistant=between[len(user_end) :],
            assistant_end=assistant_end,
            later_system=later[0],
            later_system_end=later[1],
            answer=opening[len(user_end) :],
            no_system="" if default.strip() and first_user is None else no_system,
            first_user=first_user,
            stripped_roles=stripped,
            stripped_parts=lists and "user" in stripped and not _keeps_space(rows["padded image"], USER),
            joined_system="user" in stripped and _keeps_space(rows["padded system"], USER),
            system_messages=system_messages,
            exact=True,
            text_separator=separator,
            before_image=before_image,
            after_image=after_image,
            around_images=around,
        ),
        default if default.strip() else "",
        begins_with_bos,
    )


def _later_system(row: Rendering, assistant_end: str, user: str) -> tuple[str, str] | None:
    """Return the texts around a system message after other messages; None if there is no such."""
    parts = _cut_or_none(row, ANSWER, SYSTEM, AGAIN)
    if parts is None or not parts[1].startswith(assistant_end) or not parts[2].endswith(user):
        return None
    return parts[1][len(assistant_end) :], parts[2][: len(parts[2]) - len(user)]


def _keeps_space(row: Rendering, marker: str) -> bool:
    """Whether the white space before a padded marker is there."""
    return f"{PAD}{marker}" in (row.text or "")


def _stripped_roles(rows: Mapping[str, Rendering]) -> tuple[str, ...]:
    """Return the roles whose messages lose the white space around them."""
    roles = {"user": (rows["padded"], USER), "assistant": (rows["padded"], ANSWER)}
    roles["system"] = (rows["padded system"], SYSTEM)
    return tuple(
        role for role, (row, marker) in roles.items() if row.text and f"{PAD}{marker}{PAD}" not in row.text
    )


def _part_texts(rows: Mapping[str, Rendering]) -> tuple[str, str, str, str]:
    """Return the texts between two texts, before an image, after one, and after a last one."""
    _, separator, _ = _cut(rows["texts"].require(), USER, AGAIN)
    first, last = (rows[name].require() for name in ("image first", "image last"))
    if IMAGE_PLACEHOLDER not in first:
        raise CannotDeriveError(f"it writes no {IMAGE_PLACEHOLDER} where an image is")
    if last.find(IMAGE_PLACEHOLDER) < last.find(USER):
        raise CannotDeriveError("it moves the images of a message before its texts")
    _, after, _ = _cut(first, IMAGE_PLACEHOLDER, USER)
    _, before, end = _cut(last, USER, IMAGE_PLACEHOLDER)
    return separator, before, after, end


def _cut(text: str, *markers: str) -> tuple[str, ...]:
    """Split a text at markers, which it must have once each, in this order."""
    parts = []
    for marker in markers:
        if text.count(marker) != 1:
            raise CannotDeriveError("it does not write each message once")
        before, _, text = text.partition(marker)
        if "'type': 'text'" in before or '"type": "text"' in before:
            raise CannotDeriveError("it takes no list of parts as a message", rank=0)
        parts.append(before)
    return (*parts, text)


def _cut_or_none(row: Rendering, *markers: str) -> tuple[str, ...] | None:
    try:
        return _cut(row.text, *markers) if row.text is not None else None
    except CannotDeriveError:
        return None


def _common(one: str, other: str) -> str:
    """Return the common start of two texts."""
    pairs = zip(one, other, strict=False)
    return "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _common_end(texts: Sequence[str]) -> str:
    """Return the common end of texts."""
    end = texts[0]
    for text in texts[1:]:
        end = _common(end[::-1], text[::-1])[::-1]
    return end


def _outside_tokens(text: str, size: int, tokens: Sequence[str]) -> str:
    """Return the first ``size`` characters of a text, without a token that is cut by their end."""
    for token in tokens:
        start = text.find(token, max(size - len(token) + 1, 0))
        if 0 <= start < size:
            size = start
    return text[:size]


def _between_ends(text: str, start: str, end: str) -> str:
    """Return what is between a start and an end; empty if the text has others."""
    inner = len(text) - len(start) - len(end)
    return (
        text[len(start) : len(start) + inner]
        if inner > 0 and text.startswith(start) and text.endswith(end)
        else ""
    )


def sample_conversations(template: ChatTemplate, lists: bool) -> list[list[dict[str, Any]]]:
    """Return conversations that a template supports: random ones, and an answer with reasoning."""
    generator = random.Random(0)
    contents = (("user", TEXTS[0]), ("assistant", REASONING), ("user", TEXTS[1]))
    conversations = [[_message(role, content, lists) for role, content in contents]]
    for _ in range(CHECKED_CONVERSATIONS):
        messages = []
        if template.system_messages != "none" and generator.random() < 0.4:
            messages.append(_message("system", generator.choice(TEXTS), lists))
        turns = generator.randint(1, 4)
        for turn in range(turns):
            parts: list[str | None] = [generator.choice(TEXTS)]
            if lists:
                parts += [generator.choice((*TEXTS, None)) for _ in range(generator.randint(0, 2))]
            parts = [*[None] * generator.choice((0, 0, 1, 2)), *parts]
            messages.append(_message("user", parts, lists))
            if turn < turns - 1:
                messages.append(_message("assistant", generator.choice(TEXTS), lists))
                if template.system_messages == "anywhere" and generator.random() < 0.2:
                    messages.append(_message("system", generator.choice(TEXTS), lists))
        conversations.append(messages)
    return conversations


def check_template(
    rendered: Sequence[Rendering],
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    tokenizer: Tokenizer,
    bos: str,
) -> None:
    """Compare the rendered conversations with the derived template, as texts and as token ids.

    Args:
        rendered: by the template in Jinja.
        conversations: the conversations.
        tokenizer: with the derived prompt format.
        bos: the text of BOS.

    Raises:
        CannotDeriveError: they differ; names the first difference.
    """
    spec = tokenizer.spec
    for row, messages in zip(rendered, conversations, strict=True):
        expected = row.require().removeprefix(bos)
        prompt = format_chat([*map(_parse, messages)], spec.system_prompt, spec.template)
        if expected != prompt:
            raise CannotDeriveError(
                "it does more than put texts between the messages of a conversation, and"
                f" {describe_first_difference(expected, str(prompt), 'this')}",
            )
        if tokenizer.encode(prompt) != tokenizer.encode(expected):
            raise CannotDeriveError(f"its special tokens cannot be told from text in {_quote(expected, 0)}")


def _parse(message: Mapping[str, Any]) -> Message:
    """Read a message; ``<image_placeholder>`` in a string is an image."""
    content = message["content"]
    if isinstance(content, str):
        images = content.count(IMAGE_PLACEHOLDER)
        text = content.replace(IMAGE_PLACEHOLDER, "")
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return Message.from_dict({**message, "content": content})


def describe_first_difference(text: str, ours: str, name: str = "the built-in prompt") -> str:
    """Describe in a clause where a rendered conversation first differs from another text."""
    pairs = enumerate(zip_longest(text, ours))
    place = next((index for index, (left, right) in pairs if left != right), 0)
    return f"it renders {_quote(text, place)} where {name} has {_quote(ours, place)}"


def _quote(text: str, place: int) -> str:
    start = max(place - QUOTED_CHARACTERS, 0)
    return repr(text[start : start + 2 * QUOTED_CHARACTERS])
