"""``python -m dsvl_export.cli``."""

from dsvl_export.cli import main

main()
