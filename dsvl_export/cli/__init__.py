"""The command line: ``dsvl-export COMMAND``."""

from dsvl_export.cli import bundles, planning, proof, quantizing
from dsvl_export.cli.app import app, main

__all__ = ["app", "bundles", "main", "planning", "proof", "quantizing"]
