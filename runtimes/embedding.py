"""The token embedding: one memory-mapped table for all backends."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from runtimes.bundle.files import parse_json
from runtimes.errors import UserError

MAX_HEADER = 1 << 20  # bytes; the header describes one tensor
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class TokenEmbedding:
    """Rows ``[V, D]`` of a safetensors file with the single tensor ``token_embedding``.

    Only the rows of a lookup are read from the file; bfloat16 is widened to float32.
    """

    def __init__(self, file: Path) -> None:
        """Map the file.

        Raises:
            UserError: the file is not readable as a token embedding.
        """
        try:
            with file.open("rb") as handle:
                header_bytes = int.from_bytes(handle.read(8), "little")
                if header_bytes > MAX_HEADER:
                    raise ValueError(f"its header of {header_bytes} bytes is too long")
                entry = parse_json(handle.read(header_bytes), "its header")["token_embedding"]
            self.dtype, shape = entry["dtype"], tuple(entry["shape"])
            if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ValueError(f"it has the shape {shape}")
            dtype, begin = np.dtype(_DTYPES[self.dtype]), 8 + header_bytes + entry["data_offsets"][0]
            if not 8 <= begin <= begin + prod(shape) * dtype.itemsize <= file.stat().st_size:
                raise ValueError(f"it is too short for the shape {shape}")
            self.rows = np.memmap(file, dtype, "r", begin, shape)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, UserError) as error:
            raise UserError(
                f"The token embedding {file} is not readable ({error}); export the bundle again."
            ) from error

    def lookup(self, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Look up the embeddings ``[..., D]`` of token ids ``[...]``, as ``dtype``.

        Raises:
            UserError: the table has no row of an id: a tokenizer can have more tokens than its
                model.
        """
        try:
            rows = np.asarray(self.rows[ids])
        except IndexError as error:
            raise UserError(
                f"The prompt has the token {int(ids.max())}, which the model with its vocabulary of"
                f" {len(self.rows)} tokens does not have; change the prompt."
            ) from error
        if self.dtype == "BF16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(dtype)
