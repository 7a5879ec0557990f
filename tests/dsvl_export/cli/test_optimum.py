"""``optimum-cli export dsvl``, through the real ``optimum-cli``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from optimum.commands.optimum_cli import main as optimum_main

from dsvl_export.compilers.registry import load_compiler
from runtimes.backends.registry import BUILT_IN
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import Done, optimum, refused


def judge(bundle: Bundle, backend: str, precision: str) -> None:
    assert bundle.select(backend, precision) == (backend, precision)
    assert not bundle.problems(list(bundle.manifest.files))


@pytest.mark.parametrize(
    "backend",
    [
        backend if backend == "onnxruntime" else pytest.param(backend, marks=pytest.mark.full)
        for backend in BUILT_IN
        if backend != "executorch"
    ],
)
def test_every_backend(
    backend: str,
    one_layer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """optimum's own ``main``: one backend, and ``executorch`` below, in the real process, the others here."""

    def optimum_here(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "dsvl", *arguments])
        with pytest.raises(SystemExit) as caught:
            optimum_main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    precision, folder = load_compiler(backend).PRECISIONS[0], str(tmp_path / "bundle")
    done = (optimum if backend == "onnxruntime" else optimum_here)(
        "--model", str(one_layer), "--backend", backend, "--precision", precision, "--output", folder,
        "--capacity", "64", "--no-goldens", "--no-parity", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"] == folder
    judge(Bundle.open(folder), backend, precision)


def test_executorch(executorch_bundle: Bundle) -> None:
    judge(executorch_bundle, "executorch", "fp32")


def test_options_are_those_of_our_own_command() -> None:
    shown = optimum("--help").out
    assert all(name in shown for name in ("--model", "--scales", "--target", "--tensorrt", "--no-parity"))


def test_bad_requests_are_sentences(tmp_path: Path) -> None:
    folder = str(tmp_path / "bundle")
    assert refused(
        optimum("--model", "tiny", "--output", folder, "--precision", "int3"), "no precision 'int3'"
    )
    assert refused(optimum("--model", str(tmp_path / "none"), "--output", folder), "none")
    assert not Path(folder).exists()
