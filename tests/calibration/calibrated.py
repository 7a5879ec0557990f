"""Calibrated checkpoints: tiny, and random ones of both variants whose sizes groups of 32 divide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from calibration.choose_scales import build_scale_table
from calibration.data import load_data
from calibration.scale_table import ScaleTable
from calibration.statistics import Statistics, collect_statistics
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.session import write_token_embedding
from tests.oracles.models import hybrid_oracle, save_oracle, siglip_oracle


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint with its token table, statistics and scales."""

    source: Checkpoint
    embedding: Path
    statistics: Statistics
    table: ScaleTable


def _calibrate(source: Checkpoint, folder: Path, samples: int) -> Calibrated:
    embedding = folder / "table.safetensors"
    write_token_embedding(source, embedding)
    statistics = collect_statistics(
        source, embedding, load_data("bundled", samples).samples, folder / "statistics"
    )
    return Calibrated(source, embedding, statistics, build_scale_table(source, statistics, "mse"))


@pytest.fixture(scope="session")
def tiny_calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return _calibrate(open_checkpoint("tiny"), tmp_path_factory.mktemp("tiny-calibrated"), 16)


@pytest.fixture(scope="session", params=["siglip", "hybrid"])
def random_calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp(f"{request.param}-calibrated")
    oracle = siglip_oracle if request.param == "siglip" else hybrid_oracle
    save_oracle(oracle(intermediate_size=128, max_position_embeddings=900), folder / "checkpoint")
    return _calibrate(open_checkpoint(str(folder / "checkpoint")), folder, 6)
