"""The command line: ``dsvl-export COMMAND``."""

from dsvl_export.cli import bundles, engines, planning, proof, quantizing, serving, speed
from dsvl_export.cli.app import app, main, sort_commands

sort_commands()

__all__ = ["app", "bundles", "engines", "main", "planning", "proof", "quantizing", "serving", "speed"]
