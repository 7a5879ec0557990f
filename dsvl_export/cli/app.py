"""The entry point ``dsvl-export``; the other modules of this folder hold its commands."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import cleandoc
from typing import Annotated, Any, TextIO

import typer

from dsvl_export.cli.terminal import say, say_error
from dsvl_export.version import __version__
from runtimes.errors import UserError, first_line
from runtimes.installation import PACKAGES, install_command

app = typer.Typer(
    help="Export DeepSeek-VL and Janus to target devices, run them there, and check them against PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
DEBUG = "--debug"
OURS = ("runtimes", "calibration", "reference", "dsvl_export")
USER_ERROR, INTERNAL_ERROR = 2, 70  # exit codes; 70 is EX_SOFTWARE of sysexits.h
READER_GONE = 141  # as shells report SIGPIPE
# Help lists the commands in this order: panel → commands.
PANELS = {
    "Export, run and check": ("export", "run", "parity", "chat", "extract", "serve", "inspect", "demo"),
    "Plan a deployment": ("doctor", "targets", "plan"),
    "Verify, compare, measure and publish bundles": ("verify", "compare", "bench", "push"),
    "Switchable adapters": ("add-adapter", "remove-adapter"),
    "Quantize": ("calibrate", "sensitivity", "plan-precision"),
    "TensorRT": ("lint", "build-engine"),
}


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command in its panel of the help, with its docstring as the help.

    typer keeps the line breaks of a docstring; here the terminal's width decides where lines end.
    """
    panel = next(panel for panel, names in PANELS.items() if name in names)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)
        return app.command(name, help=text, rich_help_panel=panel)(function)

    return register


def sort_commands() -> None:
    """Order the registered commands as ``PANELS`` lists them."""
    order = [name for names in PANELS.values() for name in names]
    app.registered_commands.sort(key=lambda registered: order.index(registered.name or ""))


def _version(requested: bool) -> None:
    if requested:
        print(f"dsvl-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error. Also accepted after the command.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and print an error as one sentence on stderr.

    Exit codes: 1 is a verdict, 2 an error that the user can fix, 70 a defect of dsvl-export.

    Args:
        arguments: the words after ``dsvl-export``; None takes those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    _prepare_streams()
    with _warnings_as_sentences(), _quiet_pipes():
        try:
            app(words, prog_name="dsvl-export")
        except SystemExit as end:
            if end.code == 130:  # how typer reports Ctrl-C
                print("Interrupted.", file=sys.stderr)
            raise
        except BrokenPipeError:
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = _describe_error(error, " ".join(["dsvl-export", *words[:1]]), debug)
            say_error(message)
            sys.exit(code)


def _describe_error(error: Exception, command: str, debug: bool) -> tuple[str, int]:
    """Return the message for an error of a command, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        message = "There is not enough memory. Close other programs, or use a smaller precision or capacity."
        return message, USER_ERROR
    if isinstance(error, ImportError) and (package := _failed_package(error)) in PACKAGES:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"This command needs {package}; run: {install_command(package)}.", USER_ERROR
        reason = f"The package {package} cannot be loaded ({first_line(error)})"
        return f"{reason}; install it again: {install_command(package)}.", USER_ERROR
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # Path.expanduser
        return "A path names the home folder (~) of a user that does not exist.", USER_ERROR
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename or 'A file'} cannot be used: {reason}.", USER_ERROR
    failure = f"'{command}' failed with an internal error ({type(error).__name__}: {str(error)[:300]})."
    if debug:
        report = "Report it with the traceback above and the output of 'dsvl-export doctor'."
    else:
        report = f"Run the same command with {DEBUG}, and report what it prints with 'dsvl-export doctor'."
    return f"{failure} {report}", INTERNAL_ERROR


def _failed_package(error: ImportError) -> str:
    """Return the top-level package that an import error names, or else the one that raised it."""
    name = error.name
    if name is None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        name = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return name.partition(".")[0]


def _prepare_streams() -> None:
    """Escape characters that the encoding of stdout or stderr cannot write, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _quiet_pipes() -> Iterator[None]:
    """Exit silently if the reader of stdout is gone, as in ``dsvl-export targets | head``."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where the shell closed it
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the final flush
        sys.exit(READER_GONE)
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say_error(f"Cannot write to stdout: {error.strerror}.")
        sys.exit(USER_ERROR)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Print the first warning of each of our classes as a sentence, and hide Pillow's warnings."""
    shown: set[type[Warning]] = set()
    default = warnings.showwarning

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
            default(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = default
