"""Tokenizer: text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

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
from runtimes.text.prompt import IMAGE_PLACEHOLDER, ChatTemplate, Control, PromptText, TemplateToken
from runtimes.text.tokenizer_file import is_library_failure, read_tokenizer

T = TypeVar("T")
MAX_SPACE_RUN = 10_000  # characters of white space: half a second with a quadratic pattern
SPACES = re.compile(r"\s+")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # byte fallback, as in LLaMA's tokenizers


def _byte_characters() -> dict[str, int]:
    """Map the characters of byte-level vocabularies to bytes (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()


@dataclass(frozen=True)
class PromptSpec:
    """Token ids and texts of the prompt format, and the number of tokens of an image.

    Args:
        system_prompt: the system prompt of conversations without one of their own.
        bos_id: the first token of every prompt, unless ``add_bos`` is false.
        eos_ids: tokens that end an answer; the first also ends an assistant's message in a prompt.
        image_token_id: the token of an image placeholder.
        image_tokens: number of image tokens that each image placeholder expands to.
        image_start_ids: tokens before the image tokens of each image.
        image_end_ids: tokens after them.
        template: texts between the messages.
        template_difference: how the checkpoint's own chat template differs from ``template``, as a
            sentence; empty if it does not differ or does not exist.
        add_bos: whether a prompt begins with ``bos_id``.
    """

    system_prompt: str
    bos_id: int
    eos_ids: tuple[int, ...]
    image_token_id: int
    image_tokens: int
    image_start_ids: tuple[int, ...] = ()
    image_end_ids: tuple[int, ...] = ()
    template: ChatTemplate = field(default_factory=ChatTemplate)
    template_difference: str = field(default="", compare=False)
    add_bos: bool = True

    @property
    def eos_id(self) -> int:
        """The token that ends an assistant's message in a prompt."""
        return self.eos_ids[0]

    @property
    def keeps_built_in(self) -> bool:
        """Whether the user chose the built-in format though the checkpoint's template differs."""
        return bool(self.template_difference)

    def settings(self) -> dict[str, Any]:
        """Return the settings that affect token ids or texts, in the form of the manifest."""
        values = asdict(self)
        del values["template_difference"]
        return values

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PromptSpec:
        """Read the validated object of a manifest; bundles of 0.4 have a single ``eos_id``."""
        values = dict(raw)
        eos_ids = tuple(values.pop("eos_ids", ())) or (values["eos_id"],)
        values.pop("eos_id", None)
        template = ChatTemplate.from_dict(values.pop("template", {}))
        start_ids, end_ids = (tuple(values.pop(f"image_{end}_ids", ())) for end in ("start", "end"))
        return cls(
            eos_ids=eos_ids, template=template, image_start_ids=start_ids, image_end_ids=end_ids, **values
        )


class Tokenizer:
    """Tokenizer of a checkpoint; encoding prepends BOS, decoding skips special tokens."""

    def __init__(self, file: Path, spec: PromptSpec) -> None:
        """Read ``tokenizer.json``.

        Raises:
            UserError: the file is missing or not a tokenizer.
        """
        self._tokenizer = read_tokenizer(file)
        self.file, self.spec = file, spec
        self._plain: PlainTokenizer | None = None
        self._lock = Lock()

    def encode(self, prompt: str) -> list[int]:
        r"""Encode a prompt to token ids, BOS first; each image placeholder is still one token.

        In a ``PromptText`` (``format_chat``), only control tokens placed by the prompt format are
        control tokens; text that spells one is encoded as text. In any other string, a raw prompt,
        every spelled added token is that token.

        The time of a tokenizer can grow with the square of the length of a run of white space
        (patterns like ``\s+$`` try every start), so runs longer than MAX_SPACE_RUN characters are
        rejected; no ids change. Other tokenizers can be slow in other ways: ``serve`` encodes in a
        separate process.

        Raises:
            UserError: the text is not valid Unicode, has too long a run of white space, or the
                tokenizer fails on it.
        """
        longest = max((len(run) for run in SPACES.findall(prompt)), default=0)
        if longest > MAX_SPACE_RUN:
            raise UserError(
                f"The prompt has {longest} characters of white space in a row, but at most"
                f" {MAX_SPACE_RUN} are allowed; shorten them."
            )
        if isinstance(prompt, PromptText):
            ids = self._control_ids
            pieces = [piece if isinstance(piece, str) else ids[piece] for piece in prompt.pieces]
            tokens = self._call(lambda: self._plain_tokenizer().encode(pieces))
        else:
            tokens = self._call(lambda: self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        return [self.spec.bos_id, *tokens] if self.spec.add_bos else tokens

    @cached_property
    def _control_ids(self) -> dict[Control | TemplateToken, int]:
        """Ids of the control tokens that prompts place.

        Raises:
            UserError: the tokenizer lacks one of the template's.
        """
        ids: dict[Control | TemplateToken, int] = {
            Control.EOS: self.spec.eos_id,
            Control.IMAGE: self.spec.image_token_id,
        }
        for name in self.spec.template.control_tokens:
            number = self._tokenizer.token_to_id(name)
            if number is None:
                raise UserError(
                    f"The tokenizer {self.file} has no token {name!r}, which the prompt's template needs;"
                    " export the bundle again."
                )
            ids[TemplateToken(name)] = int(number)
        return ids

    def _plain_tokenizer(self) -> PlainTokenizer:
        """Return the plain tokenizer, built on first use (half a second with 100,000 tokens)."""
        with self._lock:
            if self._plain is None:
                placed = {self.spec.bos_id, *self._control_ids.values()}
                self._plain = PlainTokenizer(json.loads(self._tokenizer.to_str()), self._tokenizer, placed)
            return self._plain

    def _call(self, function: Callable[[], T]) -> T:
        """Call the library and convert its errors to UserError.

        It raises TypeError or UnicodeError for surrogates (from bytes that are not UTF-8), and
        panics if a regex reaches its limit.
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

    @property
    def json_text(self) -> str:
        """The content of ``tokenizer.json``."""
        return str(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token, also of special ones; a part of a character is U+FFFD."""
        return [str(self._tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]

    def token_bytes(self, token: int) -> bytes:
        """Return the exact bytes that a token adds to a text, also for a part of a character.

        The joined bytes of an answer's tokens are the bytes of its text before leading white space
        is removed (clients of ``logprobs`` join them). An added token gives its name; an unknown id
        gives no bytes.
        """
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._added:
            return (piece or "").encode()
        if "ByteLevel" in self._decoders and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        if "ByteFallback" in self._decoders and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        # Decoded after another token, because some decoders strip the start of a text.
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
        """JSON of the decoder, which contains the names of its parts."""
        decoder = self._tokenizer.decoder
        return decoder.__getstate__().decode() if decoder is not None else ""

    def stream(self) -> TokenStream:
        """Start decoding a stream of tokens."""
        return TokenStream(self._tokenizer)


class TokenStream:
    """Incremental decoding of tokens; bytes of an incomplete character are held back."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._emitted = 0  # characters

    def push(self, token: int) -> str:
        """Append a token and return the text that it completes, which is often empty."""
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """Return the rest of the text after the last token; an incomplete character is U+FFFD."""
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        return text[self._emitted :]


def expand_images(ids: Sequence[int], spec: PromptSpec, images: int) -> np.ndarray:
    """Repeat every image placeholder once per image token, between the tokens around an image.

    Returns:
        ids ``[S]`` int64.

    Raises:
        UserError: the number of placeholders differs from the number of images, or the prompt ends
            with the token that asks a model for an image.
    """
    if len(ids) and ids[-1] in spec.image_start_ids:
        raise UserError(
            "The prompt ends with the token that starts an image, but only text can be generated; remove it."
        )
    tokens = np.asarray(ids, dtype=np.int64)
    placeholders = tokens == spec.image_token_id
    if int(placeholders.sum()) != images:
        raise UserError(
            f"The prompt has {int(placeholders.sum())} {IMAGE_PLACEHOLDER} but {images} images were passed;"
            " pass one image per placeholder."
        )
    image = (*spec.image_start_ids, *[spec.image_token_id] * spec.image_tokens, *spec.image_end_ids)
    texts = np.split(tokens, np.flatnonzero(placeholders))
    return np.concatenate([texts[0], *(part for text in texts[1:] for part in (image, text[1:]))]).astype(
        np.int64
    )
