"""``runtimes.backends.mil.blob`` knows a private file format of coremltools: its writer and its reader must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtimes.backends.mil.blob import WeightFile

milstorage = pytest.importorskip(
    "coremltools.libmilstoragepython", reason="coremltools is not installed here"
)

WRITTEN = {"float": np.float32, "fp16": np.uint16, "int8": np.int8, "uint8": np.uint8, "int32": np.int32}


def test_the_format_is_that_of_the_installed_coremltools(tmp_path: Path) -> None:
    """If this fails, coremltools writes weights in another layout: change ``runtimes/backends/mil/blob.py``."""
    file = tmp_path / "weight.bin"
    writer = milstorage._BlobStorageWriter(str(file))
    random = np.random.default_rng(0)
    expected = {}
    for kind, dtype in WRITTEN.items():
        values = random.integers(0, 100, 24).astype(dtype)
        expected[kind] = (getattr(writer, f"write_{kind}_data")(values), values)
    del writer
    weights, reader = WeightFile(file), milstorage._BlobStorageReader(str(file))
    for kind, (offset, values) in expected.items():
        found = weights.read(offset, (4, 6))
        assert np.array_equal(found.view(values.dtype).ravel(), values), kind
        assert np.array_equal(np.asarray(getattr(reader, f"read_{kind}_data")(offset)), values), kind
