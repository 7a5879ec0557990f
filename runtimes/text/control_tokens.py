"""A tokenizer for text that may spell control tokens: it recognizes only those that the prompt format places.

The ``tokenizers`` library finds added tokens in any text it encodes (its ``encode_special_tokens`` leaves out
only those with ``special: true``). So the plain tokenizer is built from the same ``tokenizer.json``, in which
each control token is renamed to a random name that no text can guess. The prompt format writes that name
where it places a control token. Everything else (splits at control tokens, normalizer, pre-tokenizer,
merges across the format's own text and the content) stays the library's, so that ids of ordinary text do
not change.
"""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from runtimes.errors import UserError


def is_control(token: Mapping[str, Any]) -> bool:
    """Whether an entry of ``added_tokens`` is a control token rather than ordinary vocabulary.

    Control tokens are those with ``special: true`` and those that hold a punctuation mark or symbol, such
    as ``<patch_placeholder>``. Words, white space and single characters that were added to a vocabulary are
    text: DeepSeek's own tokenizer adds letters such as ``ö``.
    """
    content = str(token["content"]).replace("▁", " ")  # Metaspace's white space
    marked = any(unicodedata.category(character)[0] in "PS" for character in content)
    return bool(token.get("special")) or (len(content) > 1 and marked)


class PlainTokenizer:
    """Encodes text and control tokens that are given apart.

    Args:
        raw: the content of ``tokenizer.json``.
        original: the tokenizer of that file.
        placed: ids of the control tokens that prompts place; they are control tokens whatever their flags.
    """

    def __init__(self, raw: Mapping[str, Any], original: Tokenizer, placed: Collection[int]) -> None:
        tokens = raw.get("added_tokens") or []
        numbers = original.get_vocab(with_added_tokens=True)
        ids = {str(token["content"]): numbers[str(token["content"])] for token in tokens}
        # Brackets of mathematics at both ends: no normalizer changes them, no vocabulary begins with them.
        names = {
            str(token["content"]): f"⦃{secrets.token_hex(16)}⦄"
            for token in tokens
            if is_control(token) or ids[str(token["content"])] in placed
        }
        self._names = {ids[content]: name for content, name in names.items()}
        self._placed = frozenset(placed)
        self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(raw, names)))
        # Added tokens that are not in the model's vocabulary are numbered as they come.
        numbers = self._tokenizer.get_vocab(with_added_tokens=True)
        renumbered = {numbers[names.get(content, content)]: ids[content] for content in ids}
        self._renumbered = {new: old for new, old in renumbered.items() if new != old}

    def encode(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of ``pieces``: texts, and ids of control tokens.

        Raises:
            UserError: the tokenizer does not know a control token, or mixes it up with text.
        """
        placed = [piece for piece in pieces if not isinstance(piece, str)]
        if missing := set(placed) - set(self._names):
            raise UserError(f"The tokenizer has no added token with the id {missing}, which prompts need.")
        text = "".join(piece if isinstance(piece, str) else self._names[piece] for piece in pieces)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._renumbered.get(number, number) for number in ids] if self._renumbered else ids
        if [number for number in ids if number in self._placed] != placed:
            raise UserError(
                "The tokenizer does not keep text and control tokens apart: its normalizer changes the"
                " control tokens, or its unknown token is one of them. Check the checkpoint's tokenizer.json."
            )
        return list(ids)


def _renamed(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A ``tokenizer.json`` with added tokens renamed; the model's own entries of those names too."""
    model = dict(raw["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, Mapping):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    elif vocab:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    tokens = [
        {**token, "content": names[content], "single_word": False}
        if (content := str(token["content"])) in names
        else token
        for token in raw.get("added_tokens") or []
    ]
    return {**raw, "model": model, "added_tokens": tokens}


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge of a BPE model makes or takes a renamed piece."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
