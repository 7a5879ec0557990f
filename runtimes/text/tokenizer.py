"""Text to tokens and back: the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from runtimes.errors import UserError
from runtimes.text.control_tokens import PlainTokenizer
from runtimes.text.prompt import IMAGE_PLACEHOLDER, ChatTemplate, Control, PromptText
from runtimes.text.tokenizer_file import is_library_failure, read_tokenizer

T = TypeVar("T")
LONGEST_SPACE = 10_000  # characters of white space in a row: about half a second with a quadratic pattern
SPACES = re.compile(r"\s+")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of byte fallback, as in LLaMA's tokenizers


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()


@dataclass(frozen=True)
class PromptSpec:
    """Token ids and texts of the prompt format, and how many tokens an image becomes.

    Args:
        eos_ids: tokens that end an answer; the first one also ends an assistant's message in a prompt.
        image_tokens: tokens that each image placeholder becomes.
        template_difference: how the checkpoint's own chat template differs from ``template``, as a
            sentence; empty where it does not, or there is none.
    """

    system_prompt: str
    bos_id: int
    eos_ids: tuple[int, ...]
    image_token_id: int
    image_tokens: int
    template: ChatTemplate = field(default_factory=ChatTemplate)
    template_difference: str = field(default="", compare=False)

    @property
    def eos_id(self) -> int:
        """The token that ends an assistant's message in a prompt."""
        return self.eos_ids[0]

    def settings(self) -> dict[str, Any]:
        """All that changes token ids or texts, as in a manifest."""
        values = asdict(self)
        del values["template_difference"]
        return values

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PromptSpec:
        """Read the object of a manifest, which its schema has checked; 0.4 wrote one ``eos_id``."""
        values = dict(raw)
        eos_ids = tuple(values.pop("eos_ids", ())) or (values["eos_id"],)
        values.pop("eos_id", None)
        template = ChatTemplate(**values.pop("template", {}))
        return cls(eos_ids=eos_ids, template=template, **values)


class Tokenizer:
    """``tokenizer.json`` with BOS put first; decoding leaves special tokens out.

    Raises:
        UserError: the file is missing or not a tokenizer.
    """

    def __init__(self, file: Path, spec: PromptSpec) -> None:
        self._tokenizer = read_tokenizer(file)
        self.file, self.spec = file, spec
        self._plain: PlainTokenizer | None = None
        self._lock = Lock()

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, BOS first; each image placeholder is still one token.

        Of a ``PromptText`` (``format_chat``), only the control tokens that the prompt format placed are
        control tokens; text that spells one is encoded as text. Of any other string, a raw prompt, every
        spelled added token counts.

        The time that a tokenizer takes can grow with the square of a run of white space (patterns like
        ``\\s+$`` try every start), so a run is at most LONGEST_SPACE characters; a longer one is refused,
        which changes no ids. Other tokenizers can be slow in other ways: ``serve`` encodes in a process.

        Raises:
            UserError: the text is not valid Unicode, has too long a run of white space, or the tokenizer
                fails on it.
        """
        longest = max((len(run) for run in SPACES.findall(prompt)), default=0)
        if longest > LONGEST_SPACE:
            raise UserError(
                f"The prompt has {longest} characters of white space in a row, the most is {LONGEST_SPACE};"
                " shorten them."
            )
        if isinstance(prompt, PromptText):
            ids = {Control.EOS: self.spec.eos_id, Control.IMAGE: self.spec.image_token_id}
            pieces = [ids[piece] if isinstance(piece, Control) else piece for piece in prompt.pieces]
            tokens = self._call(lambda: self._plain_tokenizer().encode(pieces))
        else:
            tokens = self._call(lambda: self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        return [self.spec.bos_id, *tokens]

    def _plain_tokenizer(self) -> PlainTokenizer:
        """Built when it is first needed, which takes half a second with 100,000 tokens."""
        with self._lock:
            if self._plain is None:
                placed = {self.spec.bos_id, self.spec.eos_id, self.spec.image_token_id}
                self._plain = PlainTokenizer(json.loads(self._tokenizer.to_str()), self._tokenizer, placed)
            return self._plain

    def _call(self, function: Callable[[], T]) -> T:
        """Call the library; what it raises becomes a UserError.

        It raises TypeError and UnicodeError for surrogates, from bytes that are not UTF-8, and panics where
        a regex gives up.
        """
        try:
            return function()
        except (TypeError, UnicodeError) as error:
            raise UserError("The prompt is not valid UTF-8 text.") from error
        except BaseException as error:
            if isinstance(error, UserError) or not is_library_failure(error):
                raise
            raise UserError(
                f"The tokenizer {self.file} failed on the prompt ({error}); shorten the prompt, or check"
                " the checkpoint's tokenizer.json."
            ) from error

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text, special ones written out; parts of a character give U+FFFD."""
        return [str(self._tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token adds to a text; of a part of a character, that part.

        The bytes of an answer's tokens, joined, are the bytes of its text before white space at its start is
        left out (for ``logprobs``, whose clients rejoin them). A control or other added token gives its
        name, an id that no token has gives none.
        """
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._added:
            return (piece or "").encode()
        if "ByteLevel" in self._decoders and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        if "ByteFallback" in self._decoders and (found := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(found[1])
        # After another token, so that a decoder that strips the start of a text leaves this one's alone.
        once, twice = (
            str(self._tokenizer.decode([token] * count, skip_special_tokens=False)) for count in (1, 2)
        )
        return twice[len(once) :].encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        """Ids of added tokens."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> str:
        """The decoder's JSON, which names the kinds that it is made of."""
        decoder = self._tokenizer.decoder
        return decoder.__getstate__().decode() if decoder is not None else ""

    def stream(self) -> TokenStream:
        return TokenStream(self._tokenizer)


class TokenStream:
    """Text of tokens as they come; bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """What is still held back when no more tokens come: the beginning of a character, as U+FFFD."""
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        return text[self._given :]


def expand_images(ids: Sequence[int], spec: PromptSpec, images: int) -> np.ndarray:
    """``[S]`` int64 ids in which every placeholder is repeated once per image token.

    Raises:
        UserError: the prompt has more or fewer placeholders than there are images.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    placeholders = tokens == spec.image_token_id
    if int(placeholders.sum()) != images:
        raise UserError(
            f"The prompt has {int(placeholders.sum())} {IMAGE_PLACEHOLDER} but {images} images were given."
        )
    return np.repeat(tokens, np.where(placeholders, spec.image_tokens, 1))
