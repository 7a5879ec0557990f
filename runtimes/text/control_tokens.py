"""Tokenization of untrusted text, in which only the prompt format places control tokens.

The ``tokenizers`` library finds added tokens in any text that it encodes (its
``encode_special_tokens`` excludes only those with ``special: true``). So the plain tokenizer is
built from the same ``tokenizer.json`` with each control token renamed to a random name that no text
can guess. The prompt format writes that name where it places a control token. The rest (splits at
control tokens, normalizer, pre-tokenizer, merges across the format's own text and the content) is
still the library's, so the ids of ordinary text do not change.
"""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from runtimes.errors import UserError


def is_control_token(token: Mapping[str, Any]) -> bool:
    """Whether an entry of ``added_tokens`` is a control token rather than ordinary vocabulary.

    Control tokens are those with ``special: true`` and those with a punctuation mark or symbol,
    such as ``<patch_placeholder>``. Words, white space and single characters that were added to a
    vocabulary are text: DeepSeek's own tokenizer adds letters such as ``ö``.
    """
    content = str(token["content"]).replace("▁", " ")  # Metaspace's white space
    has_symbol = any(unicodedata.category(character)[0] in "PS" for character in content)
    return bool(token.get("special")) or (len(content) > 1 and has_symbol)


class PlainTokenizer:
    """Encoder of prompts whose text and control tokens are separate pieces."""

    def __init__(self, raw: Mapping[str, Any], original: Tokenizer, placed: Collection[int]) -> None:
        """Build the tokenizer with renamed control tokens.

        Args:
            raw: the content of ``tokenizer.json``.
            original: the tokenizer of that file.
            placed: ids of the control tokens that prompts place; they count as control tokens
                whatever their flags.
        """
        tokens = raw.get("added_tokens") or []
        vocabulary = original.get_vocab(with_added_tokens=True)
        ids = {str(token["content"]): vocabulary[str(token["content"])] for token in tokens}
        # Mathematical brackets: no normalizer changes them, no vocabulary entry starts with them.
        names = {
            str(token["content"]): f"⦃{secrets.token_hex(16)}⦄"
            for token in tokens
            if is_control_token(token) or ids[str(token["content"])] in placed
        }
        self._names = {ids[content]: name for content, name in names.items()}
        self._placed = frozenset(placed)
        self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(raw, names)))
        # Added tokens that are not in the model's vocabulary get new ids, in order.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        renumbered = {vocabulary[names.get(content, content)]: ids[content] for content in ids}
        self._renumbered = {new: old for new, old in renumbered.items() if new != old}

    def encode(self, pieces: Sequence[str | int]) -> list[int]:
        """Encode ``pieces``, which are texts and ids of control tokens.

        Raises:
            UserError: the tokenizer lacks a control token, or confuses one with text.
        """
        placed = [piece for piece in pieces if not isinstance(piece, str)]
        if missing := set(placed) - set(self._names):
            raise UserError(
                f"The tokenizer has no added tokens with the ids {sorted(missing)}, which prompts need."
            )
        text = "".join(piece if isinstance(piece, str) else self._names[piece] for piece in pieces)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._renumbered.get(number, number) for number in ids] if self._renumbered else ids
        if [number for number in ids if number in self._placed] != placed:
            raise UserError(
                "The tokenizer does not keep text and control tokens apart: its normalizer changes the"
                " control tokens, or its unknown token is one of them; check the checkpoint's"
                " tokenizer.json."
            )
        return list(ids)


def _renamed(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename added tokens of a ``tokenizer.json`` and the model's entries of the same names."""
    model = dict(raw["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, Mapping):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    elif vocab:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _uses_renamed(merge, names)]
    tokens = [
        {**token, "content": names[content], "single_word": False}
        if (content := str(token["content"])) in names
        else token
        for token in raw.get("added_tokens") or []
    ]
    return {**raw, "model": model, "added_tokens": tokens}


def _uses_renamed(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge of a BPE model has a renamed piece as input or output."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
