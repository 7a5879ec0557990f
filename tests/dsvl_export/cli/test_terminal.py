"""What is printed: texts of strangers are harmless, streams may have any encoding, pipes may end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dsvl_export.cli import display
from dsvl_export.cli.app import _warnings_as_sentences
from dsvl_export.cli.conversation import _image_file
from dsvl_export.cli.terminal import answer_text, json_text, without_controls
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.images import ImageWarning
from tests.dsvl_export.cli.command_line import refused

EVIL = "a\x1b]0;title\x07[red]b[/red] [link=http://x]c[/link]\x9b31m\u202ed"
SHOWN = r"a\x1b]0;title\x07[red]b[/red]"
CLI = [sys.executable, "-m", "dsvl_export.cli"]


def test_controls_are_written_out() -> None:
    assert without_controls("tab\t line\n é 漢 😀") == "tab\t line\n é 漢 😀"
    assert without_controls("\x1b[2J\r\x7f\x9b\u202e\x00") == r"\x1b[2J\r\x7f\x9b\u202e\x00"


def test_answers_are_harmless_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_text("\x1b[2J") == "\x1b[2J"
    monkeypatch.setattr(sys, "stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert answer_text("\x1b[2J") == r"\x1b[2J"


def test_json_can_be_written_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii", "cp1252"):
        for value in ("é\x9b\x1b\u202e", "\ud800", "漢"):
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
            text = json_text(value)
            print(text, flush=True)
            assert json.loads(text) == value
            assert without_controls(text) == text


def test_texts_of_a_manifest_are_shown_as_they_are(run, bundle_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Neither the terminal nor rich's markup does what they say."""
    raw = json.loads((bundle_copy / MANIFEST).read_text())
    raw["checkpoint"]["name"] = EVIL
    for contract in raw["contracts"]["fp32"].values():
        contract["inputs"][0]["meaning"] = "[bold]x\x1b[2J"
    (bundle_copy / MANIFEST).write_text(json.dumps(raw))
    done = run("inspect", bundle_copy)
    assert done.code == 0, done.err
    assert not set("\x1b\x9b\u202e") & set(done.out)
    assert SHOWN in done.out
    assert r"[bold]x\x1b[2J" in done.out
    assert refused(run("run", bundle_copy, "--prompt", "x", "--image", EVIL), SHOWN)


def test_tables_keep_their_own_colors() -> None:
    written = io.StringIO()
    console = display.SafeConsole(file=written, force_terminal=True, color_system="standard", highlight=False)
    console.print("[red]\x1b[2J[/]")
    assert written.getvalue() == "\x1b[31m\\x1b[2J\x1b[0m\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_streams_that_are_not_utf8(encoding: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LANG": "C", "PYTHONUTF8": "0"}
    link = tmp_path / "Bündel漢"
    link.symlink_to(tiny_bundle.folder)
    for command, code in (
        (["inspect", link], 0),
        (["inspect", link, "--json"], 0),
        (["inspect", f"{link}\udcff"], 2),
    ):
        words = [os.fsencode(str(word)) for word in command]
        done = subprocess.run([*CLI, *words], capture_output=True, env=environment)
        assert b"Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        if "--json" in command:
            assert json.loads(done.stdout.decode(encoding))["model"]


def test_a_reader_that_leaves_ends_it_quietly(tiny_bundle: Bundle) -> None:
    command = [*CLI, "inspect", str(tiny_bundle.folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Make every command that opens a bundle raise."""

    def prepare(error: Exception) -> None:
        def fail(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(Bundle, "open", fail)

    return prepare


def test_internal_errors_are_a_sentence_without_debug(run, failing, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    failing(RuntimeError("a\nb\x1b[2J"))
    done = run("inspect", tmp_path)
    assert done.code == 70
    assert done.err == (
        "Error: 'dsvl-export inspect' failed with an internal error (RuntimeError: a b\\x1b[2J)."
        " Run the same command with --debug, and report what it prints with 'dsvl-export doctor'.\n"
    )
    for words in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
        told = run(*words)
        assert told.code == 70
        assert "Traceback (most recent call last)" in told.err
        assert "Report it with the traceback above" in told.err.splitlines()[-1]


def raised_in(module: str) -> ImportError:
    """An import error without a name, as C extensions raise them, from a module."""
    try:
        exec("raise ImportError('libnvinfer.so.10: cannot open')", {"__name__": module})
    except ImportError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ModuleNotFoundError("", name="coreai_torch"), 2, "pip install 'dsvl-export[coreai]'"),
        (ModuleNotFoundError("No module named 'torch.x'", name="torch.x"), 2, "package torch cannot be loaded"),
        (ModuleNotFoundError("No module named 'numpy.x'", name="numpy.x"), 70, "internal error (ModuleNot"),
        (ModuleNotFoundError("No module named 'six'", name="six"), 70, "internal error (ModuleNotFoundError"),
        (ModuleNotFoundError("No module named 'transformers'", name="transformers"), 70, "internal error"),
        (ImportError("cannot import name 'x' from 'runtimes'", name="runtimes"), 70, "internal error"),
        (ImportError("cannot import name 'x' from 'PIL'", name="PIL"), 70, "internal error (ImportError: c"),
        (ImportError("libcudart.so.12: cannot open", name="onnxruntime.capi.x"), 2,
         "The package onnxruntime cannot be loaded (libcudart.so.12: cannot open); install it again: pip install"),
        (raised_in("tensorrt.tensorrt"), 2, "The package tensorrt cannot be loaded (libnvinfer.so.10"),
        (raised_in("dsvl_export.cli"), 70, "internal error (ImportError: libnvinfer"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x cannot be used: Permission denied."),
        (OSError("no number"), 2, "A file cannot be used: no number."),
    ],
)  # fmt: skip
def test_what_is_said_of_an_error(  # type: ignore[no-untyped-def]
    run, failing, tmp_path: Path, error: Exception, code: int, sentence: str
) -> None:
    failing(error)
    done = run("inspect", tmp_path)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert sentence in done.err


def test_our_warnings_are_sentences_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with _warnings_as_sentences():
            for name in ("one", "two"):
                warnings.warn(f"{name} is dark.", ImageWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: one is dark.\n"


@pytest.mark.parametrize("text", ["{0}", " {0} ", '"{0}"', "'{0}'", "{escaped}", "~/{name}", '"~/{name}"'])
def test_images_of_a_chat_may_be_quoted(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my photo.png"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _image_file(text.format(file, escaped=str(file).replace(" ", "\\ "), name=file.name)) == file


@pytest.mark.parametrize("text", ["it's.png", "~nobody-of-this-name/x.png", "'", ""])
def test_odd_names_of_images_in_a_chat_raise_nothing(text: str) -> None:
    assert isinstance(_image_file(text), Path)
