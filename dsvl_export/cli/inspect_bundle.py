"""The command ``inspect``, which shows what a bundle contains."""

from __future__ import annotations

from dsvl_export.cli.app import command
from dsvl_export.cli.options import BundleFolder, Json


@command("inspect")
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Show the contents of a bundle: model, artifacts, sizes, contracts and parity verdicts."""
    from dsvl_export.cli import display
    from runtimes.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        display.print_json(opened.manifest.to_dict())
    else:
        for table in display.bundle_tables(opened):
            display.out.print(table)
