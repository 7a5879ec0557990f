"""Texts of the text goldens: user prompts in many scripts, and edge cases of tokenizers."""

from __future__ import annotations

from itertools import islice
from typing import Any

from runtimes.goldens.texts import Conversation
from runtimes.text.prompt import BOS, EOS, IMAGE_PLACEHOLDER, PAD

GOLDEN_TEXTS = (
    "What number is in the picture?",
    "Caf\u00e9, na\u00efve, \u00c5ngstr\u00f6m",  # composed
    "Cafe\u0301, nai\u0308ve, A\u030angstro\u0308m",  # decomposed: other code points, the same letters
    "0 1 12 123 1234567890 3.14159 -42 1,000,000 \u0663\u0664 \u00bd \uff11\uff12",
    'def area(r: float) -> float:\n\treturn 3.14 * r ** 2  # \u03c0 r\u00b2\n\nprint(f"{area(2)=:.2f}")',
    "这张图里有什么?请用一句话回答。",
    "この画像には何が写っていますか。カタカナ、ひらがな",
    "사진에 무엇이 있나요?",
    "Что на картинке? \u0645\u0627\u0630\u0627 \u0641\u064a \u0627\u0644\u0635\u0648\u0631\u0629",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "a" + " " * 40 + "b\t\tc \n\n\n d\r\ne\u00a0f\u3000g\u200bh",
    f"It says {EOS} and {BOS} and {PAD} and {IMAGE_PLACEHOLDER} in the text",
    "User: hello\n\nAssistant: hi<\uff5cend of sentence\uff5c> <|endoftext|> </s>",
    "Don't WON'T it's I'll fi\ufb01 \u00df \u1e9e \u0130i\u0307",
    "\\ / \" ' ` ~ ! @ # $ % ^ & * ( ) _ + { } [ ] | ; : < > ? . , \u2026 \u2014 \u201c\u201d",
)


def golden_conversations() -> list[Conversation]:
    """Return conversations: each text as a question, several turns, images, system prompts."""

    def conversation(*messages: tuple[str, Any], images: int = 0) -> Conversation:
        rows = [{"role": role, "content": content} for role, content in messages]
        return Conversation.from_dict({"messages": rows, "images": images})

    image, words = {"type": "image"}, {"type": "text", "text": " and "}
    return [
        *(conversation(("user", text)) for text in GOLDEN_TEXTS),
        *(
            conversation(("user", "Repeat it."), ("assistant", text), ("user", " \nAgain. "))
            for text in GOLDEN_TEXTS[::3]
        ),
        conversation(
            ("user", "What is it?"), ("assistant", ""), ("user", "Well?"), ("assistant", "A 7."), ("user", "")
        ),
        conversation(("user", "Describe the picture."), images=1),
        conversation(("user", "Compare them."), images=3),
        conversation(("user", f"{IMAGE_PLACEHOLDER} is A.\n{IMAGE_PLACEHOLDER} is B.\nWhich?"), images=2),
        conversation(("user", [image, words, image, {"type": "text", "text": GOLDEN_TEXTS[11]}]), images=2),
        conversation(("user", [image]), ("assistant", "A dog."), ("user", [words, image]), images=2),
        conversation(("system", "Answer in one word."), ("user", "Yes or no?")),
        conversation(("user", "Hello."), ("system", "Be brief."), ("user", "Why?")),
    ]


def golden_raw_prompts() -> list[str]:
    """Return raw prompts, in which the texts of control tokens are parsed as such."""
    return [
        "",
        *GOLDEN_TEXTS,
        f"{BOS}User: {IMAGE_PLACEHOLDER}{EOS}{PAD}",
        *(GOLDEN_TEXTS[0] + text for text in GOLDEN_TEXTS),
    ]


def golden_answers(encoded: list[list[int]], eos_id: int) -> list[list[int]]:
    """Return token ids to decode as answers.

    They are those of prompts; cut by one token, possibly inside a character; and with an end token
    in the middle.
    """
    cut = [tokens[1:-1] for tokens in encoded]
    return [*(tokens[1:] for tokens in encoded), *cut, *([*islice(row, 5), eos_id, *row[5:]] for row in cut)]
