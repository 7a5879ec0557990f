"""Grids of test cases, of which every run has the main ones and ``make test-full`` all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest


def variants_by_precision(main: Mapping[str, Sequence[str]], *others: str) -> pytest.MarkDecorator:
    """Run a test with the fixture ``pair`` of both variants in all precisions.

    Args:
        main: variant to the precisions that every run has; the same of the other variant are marked ``full``.
        others: precisions that are marked ``full`` for both variants.
    """
    precisions = dict.fromkeys([*(precision for names in main.values() for precision in names), *others])
    cases = [
        pytest.param(variant, precision, marks=() if precision in main[variant] else pytest.mark.full)
        for variant in main
        for precision in precisions
    ]
    return pytest.mark.parametrize(("pair", "precision"), cases, indirect=["pair"])
