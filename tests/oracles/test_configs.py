"""Random configs: transformers' numbers, or a sentence that refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles.random_configs import VARIANTS, compare, random_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_configs(variant: str, tmp_path: Path) -> None:
    outcomes = [compare(random_config(seed, variant), tmp_path / str(seed)) for seed in range(12)]
    assert outcomes.count("equal") >= 4
    assert any(outcome != "equal" for outcome in outcomes)


def test_a_deviation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another base of RoPE changes the logits alone."""
    raw = next(raw for raw in (random_config(seed, "siglip") for seed in range(99)) if _plain(raw))
    assert compare(raw, tmp_path / "right") == "equal"
    monkeypatch.setattr("reference.families.llama._rope_theta", lambda raw: 9000.0)
    with pytest.raises(AssertionError, match="last differ by"):
        compare(raw, tmp_path / "wrong")


def _plain(raw: dict[str, dict[str, object]]) -> bool:
    return len(raw["text_config"]) == 9 and len(raw["vision_config"]) <= 9
