"""The long golden's own parts: which rows, which numbers a cache's codes are, and what a file may hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtimes.errors import UserError
from runtimes.goldens.long_context import LongGolden, _values, logit_rows, normalize_keys


def golden(length: int = 200) -> LongGolden:
    rows = logit_rows(length)
    random = np.random.default_rng(0)
    return LongGolden(
        "0" * 64,
        length,
        np.arange(length),
        rows,
        random.standard_normal((len(rows), 7), np.float32),
        random.standard_normal((2, 16, length), np.float32),
    )


def test_rows_lie_at_borders_and_at_the_end() -> None:
    assert logit_rows(600).tolist() == [127, 128, 191, 192, 255, 256, 383, 384, 511, 512, 598, 599]
    assert logit_rows(2048).tolist()[-6:] == [1023, 1024, 1535, 1536, 2046, 2047]
    assert logit_rows(1).tolist() == [0]


def test_bits_of_float8_are_its_numbers() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(_values(codes.numpy()), expected)
    assert _values(np.array([-3, 4], np.int8)).tolist() == [-3, 4]


def test_a_shorter_cache_sees_the_beginning() -> None:
    whole = golden()
    assert whole.truncate(None) is whole.truncate(500) is whole
    part = whole.truncate(192)
    assert part.rows.tolist() == [127, 128, 191]
    assert (len(part.tokens), len(part.logits), part.keys.shape) == (192, 3, (2, 16, 192))
    scaled = normalize_keys(part.keys * np.float32(37))
    np.testing.assert_allclose(scaled, normalize_keys(part.keys), rtol=1e-5)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    golden().save(file)
    first = file.read_bytes()
    golden().save(file)
    assert file.read_bytes() == first  # the order in the file is always the same
    found = LongGolden.load(file)
    assert found.capacity == 200
    np.testing.assert_array_equal(found.keys, golden().keys)
    changes = (
        {"tokens": np.arange(3)},
        {"rows": np.array([5, 4])},
        {"rows": np.array([199, 200])},
        {"logits": np.full((9, 7), np.nan, np.float32)},
        {"keys": np.full((2, 16, 200), np.inf, np.float32)},
        {"keys": np.zeros(3, np.float32)},
    )
    for change in changes:
        replace(golden(), **change).save(file)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"long.safetensors is not a readable long golden"):
            LongGolden.load(file)
    file.write_bytes(b"broken")
    with pytest.raises(UserError, match="export the bundle again"):
        LongGolden.load(file)
