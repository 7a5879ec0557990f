"""Calibration as a stage of an export, where no scale table is given."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from calibration.calibrate import make_table
from calibration.data import load_data
from calibration.precision import PrecisionPlan
from calibration.statistics import collect
from calibration.table import ScaleTable
from reference.checkpoint import Checkpoint

SAMPLES = 64
METHOD = "mse"


def calibrate(
    source: Checkpoint, embedding_file: Path, plan: PrecisionPlan, on_step: Callable[[int, int], None]
) -> ScaleTable:
    """A scale table from the bundled pictures, tuned for nothing."""
    data = load_data("bundled", SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        statistics = collect(source, embedding_file, data.samples, Path(folder), keep=0, on_step=on_step)
    return make_table(source, statistics, METHOD)
