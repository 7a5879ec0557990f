"""The split of a decode call into what a program takes; its validation is in the session contract."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.decode_call import CallLimits, split_call

CAPACITY = 40
LIMITS = (
    CallLimits(8),
    CallLimits(8, max_rows=3),
    CallLimits(8, last_row_only=True),
    CallLimits(8, last_row_only=True, padded_capacity=CAPACITY),
)


@pytest.mark.parametrize("limits", LIMITS)
def test_pieces_cover_a_call(limits: CallLimits) -> None:
    """Every token once, in order; every wanted row once, in order; no padding behind the capacity."""
    random = np.random.default_rng(0)
    for _ in range(300):
        tokens = int(random.integers(1, CAPACITY + 1))
        position = int(random.integers(0, CAPACITY - tokens + 1))
        rows = random.choice(tokens, size=int(random.integers(0, tokens + 1))).tolist()
        pieces = split_call(tokens, rows, position, limits)
        assert [token for piece in pieces for token in range(piece.start, piece.stop)] == list(range(tokens))
        computed = [row for piece in pieces for row in piece.rows]
        assert computed == sorted(set(computed)) and set(rows) <= set(computed)
        for piece in pieces:
            assert piece.rows and all(piece.start <= row < piece.stop for row in piece.rows)
            assert len(piece.rows) <= limits.max_rows
            assert piece.stop - piece.start <= piece.length <= limits.max_tokens
            if limits.last_row_only:
                assert piece.rows == (piece.stop - 1,)
            if limits.padded_capacity:
                assert position + piece.start + piece.length <= CAPACITY
                assert piece.length in (1, limits.max_tokens)
            else:
                assert piece.length == piece.stop - piece.start


@pytest.mark.parametrize(
    ("tokens", "rows", "position", "limits", "expected"),
    [
        (5, [4], 0, CallLimits(512, 64), [(0, 5, 5, (4,))]),
        (5, [], 0, CallLimits(512, 64), [(0, 5, 5, (4,))]),
        (5, [0, 4], 0, CallLimits(3, 64), [(0, 3, 3, (0,)), (3, 5, 2, (4,))]),
        (5, range(5), 0, CallLimits(5, 2), [(0, 2, 2, (0, 1)), (2, 4, 2, (2, 3)), (4, 5, 1, (4,))]),
        (6, [5], 0, CallLimits(4, 1), [(0, 4, 4, (3,)), (4, 6, 2, (5,))]),
        (12, [11, 3], 0, LIMITS[2], [(0, 4, 4, (3,)), (4, 12, 8, (11,))]),
        (12, [11, 3], 0, LIMITS[3], [(0, 4, 8, (3,)), (4, 12, 8, (11,))]),
        (3, [2], 36, LIMITS[3], [(0, 1, 1, (0,)), (1, 2, 1, (1,)), (2, 3, 1, (2,))]),  # no place for padding
    ],
)  # fmt: skip
def test_a_call_takes_few_pieces(
    tokens: int,
    rows: list[int],
    position: int,
    limits: CallLimits,
    expected: list[tuple[int, int, int, tuple[int, ...]]],
) -> None:
    found = split_call(tokens, rows, position, limits)
    assert [(piece.start, piece.stop, piece.length, piece.rows) for piece in found] == expected
