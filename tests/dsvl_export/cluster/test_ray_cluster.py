"""Calibration, sensitivity and parity over a real Ray cluster of several nodes: the same as on one machine."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.sensitivity import SENSITIVITY_FILE
from calibration.statistics import STATISTICS_FILE, Statistics
from dsvl_export.cluster import ray_cluster as cluster
from dsvl_export.cluster.ray_cluster import ray_cluster
from dsvl_export.parity_check import parity
from dsvl_export.quantization.calibrate import CalibrationOptions, calibrate
from dsvl_export.quantization.search import sensitivity
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.compilers.nodes import processes


def kill_a_worker(seen: list[int]) -> threading.Thread:
    """Kills the first worker that is seen working."""

    def work() -> None:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            for process in processes("ray::_run"):
                time.sleep(0.05)  # in the middle of its part, which takes seconds
                try:
                    os.kill(process, 9)
                except ProcessLookupError:
                    continue
                seen.append(process)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.full
def test_calibration_with_a_worker_killed(nodes: Any, tmp_path: Path) -> None:
    """Nothing is lost and nothing changes: statistics and scales are those of one machine, bit for bit."""
    source, options = open_checkpoint("tiny"), CalibrationOptions(samples=24, rows=64)
    alone = calibrate(source, tmp_path / "alone", options).table
    killed: list[int] = []
    thread = kill_a_worker(killed)
    with ray_cluster(nodes.address) as spread:
        found = calibrate(source, tmp_path / "spread", options, spread=spread).table
    thread.join()
    assert killed
    assert found.digest == alone.digest
    one, other = (Statistics.load(tmp_path / name / STATISTICS_FILE) for name in ("alone", "spread"))
    assert other.samples == one.samples
    assert other.tensors.keys() == one.tensors.keys()
    for name, seen in one.tensors.items():
        for part, array in seen.to_tensors().items():
            assert np.array_equal(array, other.tensors[name].to_tensors()[part]), (name, part)


@pytest.mark.full
def test_sensitivity_and_parity(nodes: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    source = open_checkpoint("tiny")
    alone, _ = sensitivity(source, tmp_path / "alone", "bundled", 3, 0, ["int4-g32"], None, lambda *_: None)
    task = load_task(HELDOUT)[:60]
    judged = parity(tiny_bundle, "onnxruntime", "fp16", task=task)
    with ray_cluster(nodes.address) as spread:
        found, _ = sensitivity(
            source, tmp_path / "spread", "bundled", 3, 0, ["int4-g32"], None, lambda *_: None, spread
        )
        again = parity(tiny_bundle, "onnxruntime", "fp16", task=task, spread=spread)
    assert found.rows == alone.rows
    assert (tmp_path / "spread" / SENSITIVITY_FILE).read_bytes() == (
        tmp_path / "alone" / SENSITIVITY_FILE
    ).read_bytes()
    assert again.task == judged.task
    assert again.passed


@pytest.mark.full
def test_an_interrupted_run_goes_on(nodes: Any, tmp_path: Path) -> None:
    """Groups that were merged are not run again."""
    source, options = open_checkpoint("tiny"), CalibrationOptions(samples=24, rows=0)
    steps: list[int] = []

    def stop(name: str, done: int, total: int) -> None:
        steps.append(done)
        if name == "calibrating" and done == 16:
            raise KeyboardInterrupt

    with ray_cluster(nodes.address) as spread:
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path, options, on_step=stop, spread=spread)
        assert len(Statistics.load(tmp_path / STATISTICS_FILE).samples) == 16
        steps.clear()
        calibrate(source, tmp_path, options, on_step=lambda _, done, total: steps.append(done), spread=spread)
    assert steps[0] == 16
    assert steps[1] == 24


def lost(number: int) -> int:
    os._exit(3)


def failing(number: int) -> int:
    raise UserError(f"Part {number} has no data.")


def test_what_goes_wrong(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "RETRIES", 1)
    with ray_cluster(nodes.address) as spread:
        assert spread
        with pytest.raises(UserError, match=r"Part 7 has no data\."):
            list(spread(failing, [(7,)]))
        with pytest.raises(UserError, match="A call on the cluster failed 2 times"):
            list(spread(lost, [(1,)]))


def test_no_cluster(run, tmp_path: Path) -> None:
    command = ("calibrate", "tiny", "--output", str(tmp_path / "x"), "--ray")
    assert refused(run(*command, "127.0.0.1:1"), "Cannot connect to a Ray cluster at '127.0.0.1:1'")
