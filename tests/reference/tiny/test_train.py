"""The training script runs from start to end, small: both stages, the curve, a checkpoint that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import train


@pytest.mark.full
def test_both_stages_learn_and_write_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = train.STAGES
    stages = (replace(first, steps=40, batch=4), replace(second, steps=40, batch=8))
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train, "POOL_SIZE", 80)
    train.main(tmp_path, threads=1)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(1, 20), (1, 40), (2, 20), (2, 40)]
    assert rows[1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[3]["answer_loss"] < rows[2]["answer_loss"]
    assert rows[3]["which_loss"] < rows[2]["which_loss"]
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    weights = dict(checkpoint.load_model().named_parameters())
    # Stage 2 leaves the vision encoder as stage 1 made it, up to the rounding to half precision.
    state = torch.load(tmp_path / "stage1.pt", weights_only=True)["model"]
    name = "vision_encoder.high.blocks.1.mlp.fc1.weight"
    assert torch.equal(weights[name], state[f"model.{name}"].half().float())
    # Run again: everything is done, nothing is trained.
    train.main(tmp_path, threads=1)
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 4
