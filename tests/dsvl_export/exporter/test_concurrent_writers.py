"""Processes that write into one bundle at the same time lose nothing, and nothing is written elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsvl_export.exporter.staging import Staging
from dsvl_export.parity_check import ParityResult, parity
from dsvl_export.parity_check.report import record as records
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.quantization.calibrate import CalibrationOptions, calibrate
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.locks import FileLock, locked
from runtimes.bundle.manifest import MANIFEST, FileEntry, Manifest
from runtimes.errors import UserError


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle) -> ParityResult:
    return parity(tiny_bundle, precision="fp32")


def _record(folder: Path, result: ParityResult, number: int) -> None:
    bundle = Bundle.open(folder)
    for index in range(4):
        record_verdict(bundle, replace(result, precision=f"{number}-{index}"))


def test_verdicts_of_processes_that_run_at_once_are_all_kept(
    bundle_copy: Path, result: ParityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "write_report", lambda *arguments: time.sleep(0.01))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_record, args=(bundle_copy, result, number)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = {f"onnxruntime/{number}-{index}" for number in range(6) for index in range(4)}
    assert Bundle.open(bundle_copy).manifest.parity.keys() == expected
    assert not list(bundle_copy.rglob("*.tmp")) and not list(bundle_copy.rglob("*lock"))


def test_an_export_that_ends_while_a_report_is_rendered_keeps_its_files(
    bundle_copy: Path, result: ParityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, staging = FileEntry(1, "0" * 64), Staging(bundle_copy)

    def finish() -> None:
        staging.finish(lambda now: replace(known(now), files={**known(now).files, "new/file": entry}))

    def known(now: Manifest | None) -> Manifest:
        assert now is not None
        return now

    ending = threading.Thread(target=finish)

    def render(*arguments: object) -> None:
        ending.start()
        ending.join(0.3)  # the time that it would need

    monkeypatch.setattr(records, "write_report", render)
    staging.open()
    record_verdict(Bundle.open(bundle_copy), result)
    ending.join()
    staging.close()
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.files["new/file"] == entry
    assert manifest.parity.keys() == {"onnxruntime/fp32"}


def test_a_verdict_is_kept_while_an_export_has_the_manifest_away(
    bundle_copy: Path, result: ParityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "write_report", lambda *arguments: None)
    bundle, staging = Bundle.open(bundle_copy), Staging(bundle_copy)
    staging.open()
    (bundle_copy / MANIFEST).rename(bundle_copy / ".staging/previous.json")
    record_verdict(bundle, result)
    assert not (bundle_copy / MANIFEST).exists()
    staging.finish(lambda now: now or pytest.fail("the manifest was lost"))
    staging.close()
    assert Bundle.open(bundle_copy).manifest.parity.keys() == {"onnxruntime/fp32"}


def test_a_manifest_that_cannot_be_read_again_is_not_written(bundle_copy: Path) -> None:
    before, staging = (bundle_copy / MANIFEST).read_bytes(), Staging(bundle_copy)
    staging.open()
    bad = replace(Bundle.open(bundle_copy).manifest, default_capacity=-5)
    with pytest.raises(UserError, match="default_capacity"):
        staging.finish(lambda now: bad)
    staging.close()
    assert (bundle_copy / MANIFEST).read_bytes() == before


HOLD = """
import sys, time
from pathlib import Path
from runtimes.bundle.locks import FileLock
assert FileLock(Path(sys.argv[1])).acquire(wait=False)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert not FileLock(file).acquire(wait=False)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(file):
        assert file.exists()
    assert not file.exists()


def test_many_threads_hold_a_lock_in_turns(tmp_path: Path) -> None:
    """Its file and folder are deleted and made anew all the time."""
    holders, most, count = [0], [0], [0]

    def work() -> None:
        for _ in range(50):
            with locked(tmp_path / "folder/lock"):
                holders[0] += 1
                most[0] = max(most[0], holders[0])
                count[0] += 1
                holders[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], count[0]) == (1, 300)


def test_a_lock_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for name in ("file", "link"):
        for folder in (tmp_path / name, tmp_path / name / "folder"):
            with pytest.raises(UserError, match=f"{name} is not a folder"):
                FileLock(folder / "lock").acquire()


def test_one_calibration_of_a_folder_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"):
        with pytest.raises(UserError, match="Another calibration is writing to"):
            calibrate(open_checkpoint("tiny"), tmp_path, CalibrationOptions(samples=1, rows=0))


@pytest.mark.parametrize("name", ["reports", ".staging"])
def test_nothing_is_written_through_a_link(
    bundle_copy: Path, tmp_path: Path, result: ParityResult, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (bundle_copy / name).rglob("*") if (bundle_copy / name).exists() else ():
        file.unlink()
    if (bundle_copy / name).exists():
        (bundle_copy / name).rmdir()
    (bundle_copy / name).symlink_to(outside)
    (bundle_copy / "manifest.json.tmp").symlink_to(outside / "made")
    with pytest.raises(UserError, match=f"{name} is a link, through which files would be written elsewhere"):
        record_verdict(Bundle.open(bundle_copy), result)
    assert not list(outside.iterdir())


def test_an_export_replaces_no_folder_behind_a_link(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "onnxruntime").rename(tmp_path / "outside")
    (bundle_copy / "onnxruntime").symlink_to(tmp_path / "outside")
    staging = Staging(bundle_copy)
    staging.open()
    with pytest.raises(UserError, match="onnxruntime is a link"):
        staging.stage("onnxruntime/fp32/adaptor", {"new": 1}, lambda folder: {})
    staging.close()
    assert (tmp_path / "outside/fp32/adaptor").is_dir()


def test_a_link_in_the_folder_of_unfinished_stages_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / ".staging/goldens").mkdir()
    (bundle_copy / ".staging/goldens/.inputs").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"\.inputs is a link"):
        Staging(bundle_copy).open()
