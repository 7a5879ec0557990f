"""The help in panels, and what the shell completes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from calibration.precision_plan import recipe_names
from calibration.ranges import METHODS
from dsvl_export.cli import app
from dsvl_export.cli.app import PANELS
from dsvl_export.targets.options import DELEGATES
from dsvl_export.targets.targets import LISTED_BITS, find_target, load_targets
from reference.trace import PRECISION_DTYPES
from runtimes.backends.registry import backend_names
from runtimes.bundle.bundle import Bundle


@pytest.fixture
def complete(run, monkeypatch: pytest.MonkeyPatch):
    """Return what bash is offered for the last of the words."""

    def call(*words: object) -> list[str]:
        monkeypatch.setenv("_DSVL_EXPORT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(map(str, ("dsvl-export", *words))))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        done = run()
        assert (done.code, done.err) == (0, "")
        return done.out.split()

    return call


def test_help_lists_the_commands_in_panels_with_the_most_used_first(run) -> None:
    lines = [line.strip("│╭─ ") for line in run("--help").out.splitlines()]
    shown = [
        line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in sum(PANELS.values(), ())
    ]
    assert shown == list(sum(PANELS.values(), ()))
    assert shown[:3] == ["export", "run", "parity"]
    places = [next(i for i, line in enumerate(lines) if line.startswith(panel)) for panel in PANELS]
    assert places == sorted(places)
    assert sorted(shown) == sorted(command.name or "" for command in app.registered_commands)


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        ("export", {"Options of one backend", "Checks"}),
        ("run", {"Generation", "Runtime"}),
        ("parity", {"Parity check", "Runtime"}),
        ("serve", {"Network and access", "Limits", "Ray cluster", "Runtime", "Generation"}),
    ],
)
def test_options_of_long_commands_are_in_panels(command: str, panels: set[str]) -> None:
    group = typer.main.get_group(app)
    options = group.commands[command].params
    assert {panel for option in options if (panel := option.rich_help_panel)} == panels


def test_targets_backends_and_precisions_are_completed(complete) -> None:
    assert complete("export", "tiny", "--target", "jetson-orin") == [
        name for name in load_targets() if name.startswith("jetson-orin")
    ]
    assert complete("lint", "x.onnx", "--target", "h1") == ["h100"]
    assert complete("export", "tiny", "--backend", "''") == backend_names()
    assert complete("plan", "tiny", "--backend", "''") == list(find_target("cpu").backends)
    assert complete("export", "tiny", "--precision", "8da4w") == ["8da4w", "8da4w-g128"]
    iphone = find_target("iphone")
    for_iphone = ("export", "tiny", "--target", "iphone")
    assert complete(*for_iphone, "--backend", "''") == list(iphone.backends)
    assert complete(*for_iphone, "--backend", "coreml", "--precision", "''") == list(
        iphone.backends["coreml"]
    )
    assert complete("export", "tiny", "--target", "toaster", "--precision", "fp3") == ["fp32"]


def test_a_bundle_offers_what_it_holds(complete, tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tiny_bundle.folder
    for command in ("run", "chat", "serve", "parity", "bench", "verify", "build-engine"):
        assert complete(command, folder, "--precision", "''") == ["fp32", "fp16"], command
    assert complete("run", folder, "--backend", "''") == ["onnxruntime"]
    assert complete("run", folder, "--backend", "coreml", "--precision", "''") == []
    assert complete("compare", tmp_path, folder, "--precision-b", "fp3") == ["fp32"]
    assert complete("compare", tmp_path, folder, "--precision-a", "fp3") == []
    assert complete("run", tmp_path / "nowhere", "--precision", "''") == []
    assert complete("run", "--precision", "''") == []


def test_other_values_are_completed(complete) -> None:
    assert complete("calibrate", "tiny", "--method", "''") == list(METHODS)
    assert complete("export", "tiny", "--delegate", "''") == list(DELEGATES)
    assert complete("parity", "x", "--task", "n") == ["none"]
    assert complete("export", "t") == ["tiny"]


def test_completed_precisions_are_those_that_exist() -> None:
    assert set(LISTED_BITS) == {*PRECISION_DTYPES, *recipe_names()}


def test_help_and_completion_import_nothing_heavy(tiny_bundle: Bundle) -> None:
    """The start of every command: also what ``--help`` and ``--version`` need."""
    script = (
        "import sys\nfrom dsvl_export.cli import main\n"
        "assert not {'numpy', 'yaml', 'PIL', 'rich.progress'} & set(sys.modules)\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)"
    )
    words = f"dsvl-export run {tiny_bundle.folder} --precision fp1"
    bash = {"_DSVL_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**bash, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["fp16"], "")
