"""``optimum-cli export dsvl``, through the real ``optimum-cli``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsvl_export.compilers import load_compiler
from runtimes.backends import BUILT_IN
from runtimes.bundle import Bundle
from tests.dsvl_export.command_line import Done, refused


def optimum(*arguments: str) -> Done:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "dsvl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("backend", BUILT_IN)
def test_every_backend(backend: str, tmp_path: Path) -> None:
    precision = load_compiler(backend).PRECISIONS[0]
    done = optimum(
        "--model", "tiny", "--backend", backend, "--precision", precision, "--output", str(tmp_path / "bundle"),
        "--capacity", "64", "--no-goldens", "--no-parity", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"] == str(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    assert bundle.select(backend, precision)


def test_options_are_those_of_our_own_command() -> None:
    shown = optimum("--help").out
    assert all(name in shown for name in ("--model", "--scales", "--target", "--tensorrt", "--no-parity"))


def test_bad_requests_are_sentences(tmp_path: Path) -> None:
    folder = str(tmp_path / "bundle")
    assert refused(
        optimum("--model", "tiny", "--output", folder, "--precision", "int3"), "There is no precision 'int3'"
    )
    assert refused(optimum("--model", str(tmp_path / "none"), "--output", folder), "none")
    assert not Path(folder).exists()
