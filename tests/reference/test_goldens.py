"""Recording goldens: together or one by one, whole or streamed, they are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference import goldens
from reference.session import reference_chain, write_token_embedding
from runtimes.errors import UserError
from runtimes.goldens import GREEDY_TOKENS, load_golden
from tests.conftest import OraclePair


def test_groups_change_nothing(pair: OraclePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of all requests against one group per request; the progress reaches its total."""
    table = tmp_path / "table.safetensors"
    write_token_embedding(pair.checkpoint, table)
    chain = reference_chain(pair.checkpoint, table, pair.model)
    steps: list[tuple[int, int]] = []
    goldens.record_goldens(chain, tmp_path / "together", 300, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (8 + GREEDY_TOKENS, 8 + GREEDY_TOKENS)
    monkeypatch.setattr(goldens, "CACHE_BYTES", 1)
    goldens.record_goldens(chain, tmp_path / "alone", 300, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (8 + 8 * GREEDY_TOKENS, 8 + 8 * GREEDY_TOKENS)
    for index in range(8):
        together, alone = (
            load_golden(tmp_path / way / f"{index:02}.safetensors") for way in ("together", "alone")
        )
        assert together.greedy_tokens.tolist() == alone.greedy_tokens.tolist()
        assert np.allclose(together.logits, alone.logits, atol=1e-4)
        assert together.logits.argmax(-1).tolist() == together.greedy_tokens.tolist()
        assert np.array_equal(together.squares, alone.squares)
    assert len(list((tmp_path / "alone" / "images").iterdir())) == 10


def test_requests_that_do_not_fit_are_left_out(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    table = tmp_path / "table.safetensors"
    write_token_embedding(hybrid_pair.checkpoint, table)
    chain = reference_chain(hybrid_pair.checkpoint, table, hybrid_pair.model)
    goldens.record_goldens(chain, tmp_path / "some", 110, lambda done, total: None)
    assert 0 < len(list((tmp_path / "some").glob("*.safetensors"))) < 8
    with pytest.raises(UserError, match="50 positions are too few for goldens; export with --no-goldens"):
        goldens.record_goldens(chain, tmp_path / "none", 50, lambda done, total: None)
