"""Calls cut into the pieces that programs of fixed sizes take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from runtimes.fixed import Sizes, pieces

CAPACITY, CHUNK = 40, 8


@pytest.mark.parametrize("flexible", [True, False])
@pytest.mark.parametrize(
    "tokens, start", [(1, 0), (1, 39), (7, 0), (8, 3), (9, 30), (25, 15), (40, 0), (6, 34)]
)
def test_pieces_cover_a_call(tokens: int, start: int, flexible: bool) -> None:
    """Every token once, in order, in what the function takes; every wanted row once; no padding past the end."""
    sizes = Sizes(CAPACITY, "several", CHUNK, flexible, flexible)
    for rows in ([tokens - 1], [0], list(range(tokens)), [tokens // 2, 0, tokens // 2]):
        found = pieces(tokens, rows, start, sizes)
        assert [token for piece in found for token in range(piece.begin, piece.end)] == list(range(tokens))
        for piece in found:
            assert start + piece.begin + piece.length <= CAPACITY
            count = piece.end - piece.begin
            assert count <= piece.length <= CHUNK
            assert piece.rows and all(piece.begin <= row < piece.end for row in piece.rows)
            if flexible:
                assert piece.length == count
            else:
                assert piece.length in (1, CHUNK)
                assert piece.rows == (piece.end - 1,)
        taken = list(itertools.chain.from_iterable(piece.rows for piece in found))
        assert len(taken) == len(set(taken))
        assert set(rows) <= set(taken)


def test_a_prompt_takes_few_calls() -> None:
    sizes = Sizes(CAPACITY, "several", CHUNK, flexible=False, any_rows=False)
    assert [piece.length for piece in pieces(25, [24], 0, sizes)] == [8, 8, 8, 1]
    assert [piece.length for piece in pieces(6, [5], 34, sizes)] == [1] * 6  # 8 would not fit behind 34
    assert np.array_equal([piece.length for piece in pieces(12, [3, 11], 0, sizes)], [8, 8])
