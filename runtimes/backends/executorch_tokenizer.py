"""Comparison of the tokenizer of ExecuTorch's runner with the checkpoint's ``tokenizer.json``.

The runner has a C++ tokenizer of its own (the package ``pytorch_tokenizers`` is the same library).
It supports fewer features of ``tokenizer.json`` than Hugging Face's library, and returns wrong
tokens without an error for the rest.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from runtimes.errors import UserError
from runtimes.text.prompt import EOS, IMAGE_PLACEHOLDER
from runtimes.text.tokenizer_file import read_tokenizer

FILE = "tokenizer.json"  # beside the program
RUNNER_TOKENIZER = (
    "runner_tokenizer"  # in an artifact's tools: "equal on ... texts", or "none: " and the reason
)
TIMEOUT = 600  # seconds for all texts
# Reads texts and tokens from stdin; the library logs to stderr, and may end the process.
PROGRAM = """
import json, sys
from pytorch_tokenizers import pytorch_tokenizers_cpp

def attempt(call, *args):
    try:
        return call(*args)
    except (RuntimeError, UnicodeDecodeError):
        return None

tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
tokenizer.load(sys.argv[1])
texts, tokens = json.load(sys.stdin)
found = [attempt(tokenizer.encode, text, 0, 0) for text in texts]
json.dump([found, [attempt(tokenizer.decode, token) for token in tokens]], sys.stdout)
"""
TEXTS = (
    "What number is in the picture?",
    "User: Are there 3 or 27 shapes?\n\nAssistant: 3.",
    f"User: One?\n\nAssistant: Yes.{EOS}User: And another one?\n\nAssistant:",
    f"User: {IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}Compare them.\n\nAssistant:",
    f"{IMAGE_PLACEHOLDER} a {IMAGE_PLACEHOLDER}\nb",
    "def f(x):\r\n\treturn {'a': x[0] ** 2, \"b\": x != 1}  # 100%\r\n",
    "  two  three   four    spaces  \n \n\n  end ",
    "It's we'll they'RE I'd you've",
    "café cafe\u0301 \u212b \u00c5 A\u030a ﬁ ½ ² Ⅷ ٣",
    "图片里的数字是什么？ 日本語のテキスト、 한국어 텍스트.",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 e\u0301\u0302",
    "مرحبا بالعالم नमस्ते שלום Привет γειά",
    "\u00a0\u3000\u2003\u0085\u2028\u200b\ufeff\t\v\f",
    "<image_placeholder >, <｜begin▁of▁sentence|>, </s>, <|im_end|>, ▁ĠĊ",
    "1234567890 3.14159 1,000,000 0x1F 2026-11-29",
    "a!!! ?? ...--- ___ ***",
)  # fmt: skip
WORDS = ("a", "Zz", "ß", "é", "e\u0301", "日本", "가", "ा", "ع", "😀", "7", "42", "²", "!", "?!", "'s", "'LL",
         "。", "_", "-", "▁", "Ġ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085")  # fmt: skip


def encode_and_decode(
    file: Path, texts: Sequence[str], tokens: Sequence[int] = ()
) -> tuple[list[list[int] | None], list[str | None]]:
    """Encode texts and decode single tokens with the C++ tokenizer.

    Args:
        file: a ``tokenizer.json``.
        texts: texts to encode.
        tokens: ids to decode one by one.

    Returns:
        the tokens of each text and the text of each token; None where the tokenizer fails.

    Raises:
        UserError: the tokenizer cannot read the file, or its process ends.
    """
    command = [sys.executable, "-c", PROGRAM, str(file)]
    try:
        done = subprocess.run(
            command, input=json.dumps([list(texts), list(tokens)]), capture_output=True, timeout=TIMEOUT,
            text=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"ExecuTorch's tokenizer did not finish with {file} in {TIMEOUT} seconds.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise UserError(f"ExecuTorch's tokenizer cannot read {file}: {lines[-1]}.")
    found, decoded = json.loads(done.stdout)
    return found, decoded


def tokenizer_differences(file: Path, original: Path, thorough: bool = True) -> tuple[list[str], int]:
    """Compare the runner's tokenizer with Hugging Face's library.

    An app passes the texts between the images to the runner one by one, so they are compared in
    that form.

    Args:
        file: the ``tokenizer.json`` of the runner.
        original: the checkpoint's ``tokenizer.json``.
        thorough: whether to also compare characters of all scripts and random mixtures, not only
            the fixed texts and every token of the vocabulary.

    Returns:
        the texts that are encoded or decoded differently, and the number of compared texts.

    Raises:
        UserError: one of the files is not readable.
    """
    exact = read_tokenizer(original)
    image = exact.token_to_id(IMAGE_PLACEHOLDER)
    words = _words(exact)
    more = (*_characters(), *_mixtures(exact)) if thorough else ()
    texts = list(dict.fromkeys((*TEXTS, *words.values(), *more)))
    parts = [text.split(IMAGE_PLACEHOLDER) for text in texts]
    encoded, decoded = encode_and_decode(file, [part for row in parts for part in row], list(words))
    pieces = iter(encoded)
    different = []
    for text, row in zip(texts, parts, strict=True):
        ids: list[int | None] = []
        for number, tokens in enumerate(next(pieces) for _ in row):
            ids += [image] * bool(number) + ([None] if tokens is None else list(tokens))
        if ids != exact.encode(text, add_special_tokens=False).ids:
            different.append(text)
    different += [word for word, text in zip(words.values(), decoded, strict=True) if word != text]
    return different, len(texts)


def _words(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """Return the text of each token in an answer, without control tokens and partial characters."""
    special = tokenizer.get_added_tokens_decoder().keys()
    # Decoded after another token, because some decoders drop a leading space.
    first = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    start = len(tokenizer.decode(first, skip_special_tokens=False))
    numbers = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special]
    decoded = tokenizer.decode_batch([[*first, number] for number in numbers], skip_special_tokens=False)
    words = zip(numbers, (text[start:] for text in decoded), strict=True)
    return {number: word for number, word in words if word and "\ufffd" not in word}


def _characters() -> Iterator[str]:
    """Yield characters of all scripts between letters, digits, spaces and punctuation."""
    for code in (*range(1, 0x3100), *range(0x3100, 0x110000, 97)):
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs"):
            yield f"a{chr(code)}b {chr(code)} 1{chr(code)}{chr(code)}!"


def _mixtures(tokenizer: tokenizers.Tokenizer, count: int = 2000) -> Iterator[str]:
    """Yield pseudorandom sequences of words, white space, punctuation and control tokens."""
    control = [str(token.content) for token in tokenizer.get_added_tokens_decoder().values()][:20]
    draw = random.Random(0)
    for _ in range(count):
        parts = (draw.choice(WORDS if draw.random() < 0.95 else control) for _ in range(draw.randint(2, 24)))
        yield "".join(parts)


def describe_differences(different: Sequence[str]) -> str:
    """Format the first of several texts for a message."""
    shown = ", ".join(repr(text[:40]) for text in different[:3])
    return f"{shown} and {len(different) - 3} more" if len(different) > 3 else shown
