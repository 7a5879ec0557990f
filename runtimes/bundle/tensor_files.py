"""Safetensors files whose bytes depend on their content only."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def save_tensors(tensors: Mapping[str, np.ndarray], file: Path, texts: Mapping[str, str]) -> None:
    """Write tensors and metadata to a file, which is replaced in one step.

    The library writes the metadata in random order; this function sorts them.

    Raises:
        OSError: the file cannot be written.
        SafetensorError: the library refuses a tensor.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777  # from the user's umask; the library's is 0600
        save_file(arrays, temporary, metadata=dict(texts))
        _sort_metadata(temporary)
        temporary.chmod(mode)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sort_metadata(file: Path) -> None:
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        texts = dict(sorted(header.pop("__metadata__").items()))
        content = json.dumps(
            {"__metadata__": texts, **header}, ensure_ascii=False, separators=(",", ":")
        ).encode()
        if len(content) > size:
            raise ValueError(f"the header of {file} grew from {size} to {len(content)} bytes")
        handle.seek(8)
        handle.write(content.ljust(size))
