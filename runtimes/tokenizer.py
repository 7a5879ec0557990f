"""Text to tokens and back: the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from runtimes.errors import UserError
from runtimes.prompt import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class PromptSpec:
    """Token ids and texts of the prompt format, and how many tokens an image becomes."""

    system_prompt: str
    bos_id: int
    eos_id: int
    image_token_id: int
    image_tokens: int


class Tokenizer:
    """``tokenizer.json`` with BOS put first; decoding leaves special tokens out.

    Raises:
        UserError: the file is missing or no tokenizer.
    """

    def __init__(self, file: Path, spec: PromptSpec) -> None:
        if not file.exists():
            raise UserError(f"The tokenizer {file} is missing.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is no tokenizer: {error}.") from error
        self.spec = spec

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, BOS first; each image placeholder is still one token."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:  # surrogates, from bytes that are no UTF-8
            raise UserError("The prompt is not valid UTF-8 text.") from error
        return [self.spec.bos_id, *ids]

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
