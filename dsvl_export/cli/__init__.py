"""The command line: ``dsvl-export COMMAND``."""

from dsvl_export.cli import (
    adapters,
    bundles,
    checks,
    engines,
    planning,
    publishing,
    quantizing,
    running,
    serving,
    speed,
)
from dsvl_export.cli.app import app, main, sort_commands

sort_commands()

__all__ = [
    "adapters",
    "app",
    "bundles",
    "checks",
    "engines",
    "main",
    "planning",
    "publishing",
    "quantizing",
    "running",
    "serving",
    "speed",
]
