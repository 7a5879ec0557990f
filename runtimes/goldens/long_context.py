"""The long golden: a text that fills the KV cache, and the model's results at all its positions.

The other goldens end after a few hundred tokens. A RoPE table that is wrong at later positions, or
an attention window, is detected only here. Logits of every position would take gigabytes. Stored
are the logits of a few rows, and a projection of the keys of every layer and position: a key
depends on its row of the RoPE table and on the attention of all layers before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from runtimes.bundle.contracts import Contract
from runtimes.bundle.tensor_files import save_tensors
from runtimes.cache import KVCache, cache_bytes
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.taps import hashed_numbers

LONG_GOLDEN = "long.safetensors"
MIN_PROJECTIONS = 16  # smallest number per layer and position
MAX_CACHE_BYTES = 8 << 30  # of the fp32 KV cache: 8738 tokens of the 7B, 16384 of the 1.3B


@dataclass(frozen=True)
class LongGolden:
    """A long text and a model's results for it.

    Args:
        checkpoint: SHA-256 of the checkpoint.
        capacity: capacity of the bundle's KV cache.
        tokens: ids ``[S]`` int64.
        rows: ascending positions ``[K]`` int64 whose logits are stored.
        logits: ``[K, V]`` float32.
        keys: ``[L, Hkv * R, S]`` float32, from ``project_keys``.
    """

    checkpoint: str
    capacity: int
    tokens: np.ndarray
    rows: np.ndarray
    logits: np.ndarray
    keys: np.ndarray

    def truncate(self, length: int | None) -> LongGolden:
        """Return the part that fits into a KV cache of ``length`` tokens; None is no limit."""
        if length is None or length >= len(self.tokens):
            return self
        kept = self.rows < length
        return replace(
            self,
            tokens=self.tokens[:length],
            rows=self.rows[kept],
            logits=self.logits[kept],
            keys=self.keys[:, :, :length],
        )

    def save(self, file: Path) -> None:
        """Write the golden as safetensors."""
        arrays = {name: getattr(self, name) for name in ("tokens", "rows", "logits", "keys")}
        save_tensors(arrays, file, {"checkpoint": self.checkpoint, "capacity": str(self.capacity)})

    @classmethod
    def load(cls, file: Path) -> LongGolden:
        """Read a golden that ``save`` wrote.

        Raises:
            UserError: the file is not a long golden, or its arrays do not fit together.
        """
        try:
            with safe_open(file, framework="np") as handle:
                texts = handle.metadata() or {}
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}
            golden = cls(str(texts["checkpoint"]), int(texts["capacity"]), **arrays)
            golden._check()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is not a readable long golden ({error}); export the bundle again."
            ) from error
        return golden

    def _check(self) -> None:
        """Raise ValueError if the arrays do not fit together or hold NaN or infinity."""
        length, rows = len(self.tokens), self.rows
        fits = (
            self.tokens.shape == (length,)
            and length > 0
            and rows.ndim == 1
            and self.tokens.dtype == rows.dtype == np.int64
            and np.all(np.diff(rows, prepend=-1, append=length) > 0)
            and self.logits.ndim == 2
            and len(self.logits) == len(rows)
            and self.keys.ndim == 3
            and self.keys.shape[2] == length
        )
        if not fits:
            raise ValueError("the shapes of its arrays do not fit together")
        if self.first_nonfinite_part():
            raise ValueError("it holds NaN or infinity")

    def first_nonfinite_part(self) -> str:
        """Return the first part of the decoder with NaN or infinity; empty if there is none."""
        for layer, keys in enumerate(self.keys):
            if not np.isfinite(keys).all():
                return f"decoder.layers.{layer - 1}" if layer else "decoder.layers.0.self_attn.k_proj"
        return "" if np.isfinite(self.logits).all() else f"decoder.layers.{len(self.keys) - 1}"


def long_golden_length(decoder: Contract, capacity: int, max_positions: int) -> int:
    """Return the length of a bundle's long golden: its capacity, limited by ``MAX_CACHE_BYTES``."""
    return min(capacity, max_positions, MAX_CACHE_BYTES // cache_bytes(decoder.states, 1, 1))


def logit_rows(length: int) -> np.ndarray:
    """Return the positions ``[K]`` whose logits are stored: the last two, and borders of blocks.

    Blocks of a kernel, buffers and prefill chunks start at a power of two or half-way between two.
    """
    borders = [size for power in range(7, 31) for size in (1 << power, 3 << (power - 1))]
    places = {place for border in borders for place in (border - 1, border)} | {length - 2, length - 1}
    return np.array(sorted(place for place in places if 0 <= place < length), np.int64)


def record_long_golden(chain: Chain, tokens: np.ndarray, checkpoint: str, capacity: int) -> LongGolden:
    """Record the results of a chain for ``tokens [S]``; they may hold NaN and infinity."""
    rows = logit_rows(len(tokens))
    logits, cache = prefill_text(chain, tokens, rows)
    return LongGolden(checkpoint, capacity, tokens, rows, logits, project_keys(cache, len(tokens)))


def prefill_text(chain: Chain, tokens: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Prefill ``tokens [S]`` in chunks.

    Returns:
        the logits ``[K, V]`` of ``rows [K]``, and the filled cache.
    """
    cache = chain.decoder.new_cache(1, len(tokens))
    parts = []
    for start in range(0, len(tokens), chain.prefill_chunk):
        embeds = chain.embed_tokens(tokens[start : start + chain.prefill_chunk])
        inside = rows[(rows >= start) & (rows < start + len(embeds))] - start
        requested = inside if len(inside) else np.array([len(embeds) - 1])
        logits = chain.decoder.decode(embeds[None], requested, cache)[0]
        parts.append(logits[: len(inside)])
    return np.concatenate(parts), cache


def decode_rows_again(chain: Chain, tokens: np.ndarray, rows: np.ndarray, cache: KVCache) -> np.ndarray:
    """Decode each of ``rows [K]`` again as a single step after the tokens before it.

    The keys of later positions stay in the cache's memory.

    Returns:
        logits ``[K, V]``.
    """
    logits = []
    for row in reversed(rows.tolist()):
        cache.rewind(cache.length - row)
        logits.append(chain.decode(tokens[None, row : row + 1], cache)[0, 0])
    return np.stack(logits[::-1])


def project_keys(cache: KVCache, length: int) -> np.ndarray:
    """Project the first ``length`` keys of every layer and head onto random directions.

    Returns:
        ``[L, Hkv * R, S]`` float32.
    """
    layers = []
    for array in cache.arrays[::2]:  # keys, then values of each layer
        keys = _values(array[0, :, :length])  # [Hkv, S, Dh]
        heads, _, head_dim = keys.shape
        projected = keys @ _signs(head_dim, -(-MIN_PROJECTIONS // heads))  # [Hkv, S, R]
        layers.append(projected.transpose(0, 2, 1).reshape(-1, length))
    return np.stack(layers)


def normalize_keys(keys: np.ndarray) -> np.ndarray:
    """Divide each row of ``[L, Hkv * R, S]`` by its RMS, since a quantized cache holds codes."""
    size = np.sqrt(np.mean(np.square(keys, dtype=np.float64), axis=-1, keepdims=True))
    return np.asarray((keys / np.maximum(size, 1e-30)).astype(np.float32))


def _signs(rows: int, columns: int) -> np.ndarray:
    """Return a deterministic ``[rows, columns]`` matrix of 1 and -1."""
    signs = np.where(hashed_numbers(rows * columns) >> np.uint64(63), -1.0, 1.0)
    return signs.astype(np.float32).reshape(rows, columns)


def _values(keys: np.ndarray) -> np.ndarray:
    """Convert keys to float32: int8 codes keep their value, float8 bits are decoded.

    The format is E4M3 of arXiv 2209.05433.
    """
    if keys.dtype != np.uint8:
        return keys.astype(np.float32)
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    sizes = np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7.0), mantissa * 2.0**-6)
    sizes[codes & 127 == 127] = np.nan
    return np.asarray(np.where(codes < 128, sizes, -sizes).astype(np.float32)[keys])
