"""Faults of ExecuTorch programs: runs of weights in the file, as numbers of 32 or 8 bits."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from benchmarks.robustness.faults.values import change_values

LENGTHS = (512, 2048, 8192, 65536)  # bytes
LARGEST, SMALLEST = 100.0, 1e-7  # weights lie between, by their absolute value
ZEROS = 0.1  # the most of codes that are zero; structure of a program is mostly zeros


def plant(folder: Path, random: Random) -> tuple[str, list[Path]]:
    """Change weights of the program in a folder; they are told from its structure by their values."""
    (file,) = folder.glob("*.pte")
    data = np.fromfile(file, np.uint8)
    while True:
        length = random.choice(LENGTHS)
        start = random.randrange((len(data) - length) // 16) * 16
        part = data[start : start + length]
        values = _weights(part)
        changed = change_values(values.reshape(-1, 64), random) if values is not None else None
        if values is None or changed is None:
            continue
        what, array = changed
        array = array.astype(values.dtype).reshape(-1)
        if not np.array_equal(array, values):
            part[:] = array.view(np.uint8)
            data.tofile(file)
            return f"{length} bytes from {start} on ({values.dtype}) {what}", [file]


def _weights(part: np.ndarray) -> np.ndarray | None:
    """Bytes as floats, or as codes; None where they look like neither."""
    floats = np.abs(part.view(np.float32))
    with np.errstate(invalid="ignore"):
        if ((floats < LARGEST) & ((floats > SMALLEST) | (floats == 0))).mean() > 0.99:
            return part.view(np.float32) if floats.any() else None
    codes = part.view(np.int8)
    return codes if (codes == 0).mean() < ZEROS else None
