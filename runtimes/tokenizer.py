"""Text to tokens and back: the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from runtimes.control_tokens import PlainTokenizer
from runtimes.errors import UserError
from runtimes.prompt import IMAGE_PLACEHOLDER, ChatTemplate, Control, PromptText

T = TypeVar("T")


@dataclass(frozen=True)
class PromptSpec:
    """Token ids and texts of the prompt format, and how many tokens an image becomes.

    Args:
        eos_ids: tokens that end an answer; the first one also ends an assistant's message in a prompt.
        image_tokens: tokens that each image placeholder becomes.
    """

    system_prompt: str
    bos_id: int
    eos_ids: tuple[int, ...]
    image_token_id: int
    image_tokens: int
    template: ChatTemplate = field(default_factory=ChatTemplate)

    @property
    def eos_id(self) -> int:
        """The token that ends an assistant's message in a prompt."""
        return self.eos_ids[0]

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
        if not file.exists():
            raise UserError(f"The tokenizer {file} is missing.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is no tokenizer: {error}.") from error
        self.file, self.spec = file, spec
        self._plain: PlainTokenizer | None = None
        self._lock = Lock()

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, BOS first; each image placeholder is still one token.

        Of a ``PromptText`` (``format_chat``), only the control tokens that the prompt format placed are
        control tokens; text that spells one is encoded as text. Of any other string, a raw prompt, every
        spelled added token counts.

        Raises:
            UserError: the text is not valid Unicode, or the tokenizer fails on it.
        """
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
                placed = {self.spec.bos_id, *self.spec.eos_ids, self.spec.image_token_id}
                self._plain = PlainTokenizer(json.loads(self._tokenizer.to_str()), self._tokenizer, placed)
            return self._plain

    def _call(self, function: Callable[[], T]) -> T:
        """Call the library; what it raises becomes a UserError.

        It raises TypeError and UnicodeError for surrogates, from bytes that are not UTF-8, bare Exception for
        most else, and a ``PanicException``, which is a BaseException, where a regex gives up.
        """
        try:
            return function()
        except (TypeError, UnicodeError) as error:
            raise UserError("The prompt is not valid UTF-8 text.") from error
        except BaseException as error:
            if isinstance(error, UserError) or not (
                isinstance(error, Exception) or type(error).__name__ == "PanicException"
            ):
                raise
            raise UserError(
                f"The tokenizer {self.file} failed on the prompt ({error}); shorten the prompt, or check"
                " the checkpoint's tokenizer.json."
            ) from error

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text, special ones written out; parts of a character give U+FFFD."""
        return [str(self._tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]

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
