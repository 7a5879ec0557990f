"""The token embeddings: one memory-mapped table for all backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from runtimes.errors import UserError

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class TokenEmbedding:
    """Rows ``[V, D]`` of a safetensors file with the single tensor ``token_embedding``.

    Only rows that are asked for are read; bfloat16 is widened on the way.
    """

    def __init__(self, file: Path) -> None:
        try:
            with file.open("rb") as handle:
                header_bytes = int.from_bytes(handle.read(8), "little")
                entry = json.loads(handle.read(header_bytes))["token_embedding"]
            self.dtype, shape = entry["dtype"], tuple(entry["shape"])
            self.rows = np.memmap(
                file, _DTYPES[self.dtype], "r", 8 + header_bytes + entry["data_offsets"][0], shape
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"The token embedding {file} cannot be read ({error}).") from error

    def lookup(self, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """``[...]`` ids → ``[..., D]``."""
        rows = np.asarray(self.rows[ids])
        if self.dtype == "BF16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(dtype)
