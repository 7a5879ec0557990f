"""The numbers of an engine's step: where its rows go."""

from __future__ import annotations

import numpy as np

from runtimes.backends.engines.layout import append_copies
from runtimes.bundle.contracts import TensorSpec


def test_rows_of_a_step_go_to_their_places() -> None:
    spec = TensorSpec("key_cache_0", "float16", ("batch", 2, "capacity", 4), "")
    copies = append_copies(spec, 1000, 5000, np.array([[3, 4], [7, 8]]), slots=10)
    token = 4 * 2
    assert [copy.target for copy in copies] == [1000 + 3 * token, 1000 + 2 * 10 * token + 7 * token]
    assert [copy.source for copy in copies] == [5000, 5000 + 2 * 2 * token]
    assert {(copy.target_pitch, copy.source_pitch, copy.width, copy.height) for copy in copies} == {
        (80, 16, 16, 2)
    }
