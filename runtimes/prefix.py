"""The KV prefix of the system prompt: a bundle stores it, so that no prompt computes it again.

The keys and values come from the reference in fp32, and are as exact as the cache's dtype allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from runtimes.bundle.contracts import FLOATS, Contract
from runtimes.bundle.tensor_files import save_tensors
from runtimes.cache import KVCache
from runtimes.errors import UserError
from runtimes.text.prompt import Message, format_chat, place_images
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtimes.chain import Chain

ARRAYS = ("tokens", "states", "errors")
MIN_TOKENS = 8  # a shorter prefix is not worth a file


def prefix_file(precision: str) -> str:
    """Return the path of a precision's stored prefix in a bundle.

    It depends on the precision because smoothing changes the scale of the values.
    """
    return f"prefix/{precision}/prefix.safetensors"


def prefix_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens with which every conversation with the default system prompt begins."""
    spec, prompts = tokenizer.spec, []
    for text, images in (("A", 0), ("9", 0), ("\n", 0), ("é", 0), ("中", 0), ("A", 1)):
        messages = place_images([Message("user", text)], images)
        prompts.append(tokenizer.encode(format_chat(messages, spec.system_prompt, spec.template)))
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return [int(column[0]) for column in columns]


@dataclass(frozen=True)
class StoredPrefix:
    """Tokens at the start of a prompt, and their keys and values.

    Args:
        checkpoint: SHA-256 of the checkpoint.
        tokens: ids ``[P]`` int64.
        states: ``[2 * L, Hkv, P, Dh]``: keys and values of each layer; float32 in the file.
        errors: ``[2 * L]`` float32: relative RMS error of each state where the precision plan
            computes it, for the parity check.
    """

    checkpoint: str
    tokens: np.ndarray
    states: np.ndarray
    errors: np.ndarray

    def save(self, file: Path) -> None:
        """Write the prefix as safetensors."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        save_tensors(arrays, file, {"checkpoint": self.checkpoint})

    @classmethod
    def load(cls, file: Path, checkpoint: str, decoder: Contract) -> StoredPrefix:
        """Read a prefix that ``save`` wrote, for a decoder.

        Raises:
            UserError: the file cannot be read, is of another checkpoint, or does not fit.
        """
        try:
            with safe_open(file, framework="np") as handle:
                recorded = str((handle.metadata() or {})["checkpoint"])
                prefix = cls(recorded, *map(handle.get_tensor, ARRAYS))
            _, heads, _, head_dim = decoder.states[0].shape
            shape = (len(decoder.states), heads, len(prefix.tokens), head_dim)
            if decoder.states[0].dtype not in FLOATS:
                raise ValueError(f"the cache holds {decoder.states[0].dtype}")
            if recorded != checkpoint or prefix.states.shape != shape or prefix.tokens.dtype != np.int64:
                raise ValueError(f"it is of {recorded[:12]} and {list(prefix.states.shape)}")
            if prefix.errors.shape != (len(decoder.states),) or not np.isfinite(prefix.states).all():
                raise ValueError("its numbers are damaged")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is not the stored prefix of this bundle ({error}); export it again."
            ) from error
        return prefix

    def cast(self, decoder: Contract) -> StoredPrefix:
        """Return the prefix in the dtype of a decoder's cache."""
        return replace(self, states=self.states.astype(decoder.states[0].dtype))

    def write(self, cache: KVCache) -> None:
        """Set a cache of one row to the prefix, which has been cast."""
        cache.load_prefix([state[None] for state in self.states])


def compute_states(chain: Chain, tokens: np.ndarray) -> np.ndarray:
    """Return the keys and values ``[2 * L, Hkv, P, Dh]`` float32 of ``tokens [P]``."""
    cache = chain.decoder.new_cache(1, len(tokens))
    chain.prefill(chain.embed_tokens(tokens), cache)
    return np.concatenate(cache.save_prefix(len(tokens))).astype(np.float32)
