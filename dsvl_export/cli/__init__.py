"""The command line: ``dsvl-export COMMAND``."""

from dsvl_export.cli import (
    adapters,
    bench,
    build_engine,
    chat,
    demo,
    export,
    extract,
    inspect_bundle,
    lint,
    parity,
    planning,
    push,
    quantization,
    run,
    serve,
    verify,
)
from dsvl_export.cli.app import app, main, sort_commands

sort_commands()

__all__ = [
    "adapters",
    "app",
    "bench",
    "build_engine",
    "chat",
    "demo",
    "export",
    "extract",
    "inspect_bundle",
    "lint",
    "main",
    "parity",
    "planning",
    "push",
    "quantization",
    "run",
    "serve",
    "verify",
]
