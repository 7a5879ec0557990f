"""Grids of test cases, of which every run has the main ones and ``make test-full`` all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest


def variants_by_precision(main: Mapping[str, Sequence[str]]) -> pytest.MarkDecorator:
    """Run a test with the fixture ``pair`` of both variants in all precisions.

    Args:
        main: variant to the precisions that every run has; together they are all precisions, and the cases of
            the other variant are marked ``full``.
    """
    precisions = dict.fromkeys(precision for names in main.values() for precision in names)
    cases = [
        pytest.param(variant, precision, marks=() if precision in main[variant] else pytest.mark.full)
        for variant in main
        for precision in precisions
    ]
    return pytest.mark.parametrize(("pair", "precision"), cases, indirect=["pair"])
