"""The numbers of an engine's step: pieces of a call, and where its rows go."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.contracts import TensorSpec
from runtimes.engines.layout import append_copies, pieces


@pytest.mark.parametrize(
    ("length", "rows", "tokens", "most", "expected"),
    [
        (5, [4], 512, 64, [(0, 5, (4,), 1)]),
        (5, [], 512, 64, [(0, 5, (4,), 0)]),
        (5, [0, 4], 3, 64, [(0, 3, (0,), 1), (3, 5, (1,), 1)]),
        (5, [0, 1, 2, 3, 4], 5, 2, [(0, 2, (0, 1), 2), (2, 4, (0, 1), 2), (4, 5, (0,), 1)]),
        (6, [5], 2, 1, [(0, 2, (1,), 0), (2, 4, (1,), 0), (4, 6, (1,), 1)]),
    ],
)  # fmt: skip
def test_pieces(
    length: int,
    rows: list[int],
    tokens: int,
    most: int,
    expected: list[tuple[int, int, tuple[int, ...], int]],
) -> None:
    assert [(p.start, p.stop, p.rows, p.kept) for p in pieces(length, rows, tokens, most)] == expected


def test_pieces_cover_everything_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        length, tokens, most = (int(random.integers(1, high)) for high in (40, 20, 8))
        rows = sorted(random.choice(length, size=int(random.integers(0, length + 1)), replace=False).tolist())
        found = pieces(length, rows, tokens, most)
        assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])] and found[-1].stop == length
        assert [p.start + row for p in found for row in p.rows[: p.kept]] == rows
        assert all(0 < p.stop - p.start <= tokens and 0 < len(p.rows) <= most for p in found)


def test_rows_of_a_step_go_to_their_places() -> None:
    spec = TensorSpec("key_cache_0", "float16", ("batch", 2, "capacity", 4), "")
    copies = append_copies(spec, 1000, 5000, np.array([[3, 4], [7, 8]]), slots=10)
    token = 4 * 2
    assert [copy.target for copy in copies] == [1000 + 3 * token, 1000 + 2 * 10 * token + 7 * token]
    assert [copy.source for copy in copies] == [5000, 5000 + 2 * 2 * token]
    assert {(copy.target_pitch, copy.source_pitch, copy.width, copy.height) for copy in copies} == {
        (80, 16, 16, 2)
    }
