"""The command line: ``dsvl-export``; each module beside this one holds a group of its commands."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TextIO

import typer

from dsvl_export.terminal import say, say_error
from dsvl_export.version import __version__
from runtimes.errors import UserError, first_line
from runtimes.installation import PACKAGES, install_command

app = typer.Typer(
    help="Export DeepSeek-VL to the places where people run it, and prove that it computes the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
DEBUG = "--debug"
OURS = ("runtimes", "calibration", "reference", "dsvl_export")
USER_ERROR, INTERNAL_ERROR = 2, 70  # exit codes; 70 is EX_SOFTWARE of sysexits.h
READER_GONE = 141  # as shells report SIGPIPE


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dsvl-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand behind the command.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: an error is one sentence on stderr.

    Exit codes: 1 is a verdict, 2 an error that the user can put right, 70 a defect
    of dsvl-export.

    Args:
        arguments: instead of the process's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    _prepare_streams()
    with _warnings_as_sentences(), _quiet_pipes():
        try:
            app([word for word in given if word != DEBUG], prog_name="dsvl-export")
        except SystemExit as done:
            if done.code == 130:  # how typer reports Ctrl-C
                print("Interrupted.", file=sys.stderr)
            raise
        except BrokenPipeError:
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            sentence, code = _explanation(error, debug)
            say_error(sentence)
            sys.exit(code)


def _explanation(error: Exception, debug: bool) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "There is not enough memory for this; close other programs or take less.", USER_ERROR
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename or 'A file'} cannot be used: {reason}.", USER_ERROR
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return f"This needs {error.name}; run: {install_command(error.name)}.", USER_ERROR
    missing = isinstance(error, ModuleNotFoundError)
    if isinstance(error, ImportError) and not missing and (error.name or "").partition(".")[0] not in OURS:
        return f"A library cannot be loaded ({first_line(error)}); install it again.", USER_ERROR
    what = f"dsvl-export failed unexpectedly ({type(error).__name__}: {str(error)[:300]})"
    if debug:
        return f"{what}; please report it with the lines above.", INTERNAL_ERROR
    return f"{what}; run the command again with {DEBUG} and report it with what that prints.", INTERNAL_ERROR


def _prepare_streams() -> None:
    """Write out what an encoding lacks (ASCII, cp1252, half of a surrogate pair) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _quiet_pipes() -> Iterator[None]:
    """End without a word where the reader of stdout is gone, as in ``dsvl-export targets | head``."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where the shell closed it
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the very end
        sys.exit(READER_GONE)
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say_error(f"stdout cannot be written: {error.strerror}.")
        sys.exit(USER_ERROR)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Show the first warning of each of our kinds as a sentence, and none of Pillow's, while this lasts."""
    shown: set[type[Warning]] = set()
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.partition(".")[0] in OURS:
            if category not in shown:
                shown.add(category)
                say(f"Warning: {message}", stream=sys.stderr)
        elif "/PIL/" not in filename.replace(os.sep, "/"):
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual
