"""``python -m dsvl_export``: the command ``dsvl-export``, with the same exit codes."""

from dsvl_export.cli import main

main()
