"""The command line: ``dsvl-export``; each module beside this one holds a group of its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dsvl_export.version import __version__
from runtimes.errors import UserError
from runtimes.installation import install_command

app = typer.Typer(
    help="Export DeepSeek-VL to the places where people run it, and prove that it computes the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dsvl-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors of the user's making are one sentence and exit code 2.

    Args:
        arguments: instead of the process's.
    """
    try:
        app(arguments, prog_name="dsvl-export")
    except SystemExit as done:
        if done.code == 130:  # how typer reports Ctrl-C
            print("Interrupted.", file=sys.stderr)
        raise
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        needs = error.name or str(error)
        print(f"Error: This needs {needs}; run: {install_command(needs)}.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
