"""The decoder sessions of the bundle keep the session contract: the same tests as for every backend.

They feed random numbers with tolerances that fit the tiny checkpoint, so a bundle of another checkpoint
skips them: export one of ``tiny`` for the device and test it as well.
"""

from __future__ import annotations

import pytest

from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.session import DecoderSession, Execution, SessionOptions
from tests.device.conftest import Pair
from tests.runtimes.backends.test_session_contract import (
    test_bad_calls_leave_the_cache_as_it_was,
    test_batch_rows_of_different_lengths,
    test_cache_is_written_in_place,
    test_capacity_is_refused_before_the_backend_runs,
    test_chunks_equal_one_pass,
    test_contract_of_the_outputs,
    test_logit_rows_choose_rows,
    test_past_tokens_matter,
    test_reset_starts_over,
    test_rewind_forgets,
    test_some_rows_of_a_cache,
)

__all__ = [
    "test_bad_calls_leave_the_cache_as_it_was", "test_batch_rows_of_different_lengths",
    "test_cache_is_written_in_place", "test_capacity_is_refused_before_the_backend_runs",
    "test_chunks_equal_one_pass", "test_contract_of_the_outputs", "test_logit_rows_choose_rows",
    "test_past_tokens_matter", "test_reset_starts_over", "test_rewind_forgets", "test_some_rows_of_a_cache",
]  # fmt: skip
BATCH = 3  # rows that the tests decode together


@pytest.fixture(scope="session")
def decoder(bundle: Bundle, pair: Pair, execution: Execution) -> DecoderSession:
    """The decoder of a backend and precision, as a session."""
    artifact = bundle.artifact("decoder", *pair)
    if bundle.manifest.checkpoint["name"] != "tiny":
        pytest.skip("the tolerances of these tests fit the checkpoint tiny")
    if not artifact.exact_rows:
        pytest.skip(f"{pair[1]} quantizes activations, so calls of other lengths round differently")
    contract = bundle.manifest.contracts[pair[1]]["decoder"]
    options = SessionOptions(device=execution.device)
    session = load_backend(pair[0]).open_decoder(bundle.path(artifact.files[0]), contract, options)
    if session.max_batch < BATCH:
        pytest.skip(f"the decoder takes {session.max_batch} rows; build it with --max-batch {BATCH}")
    return session
