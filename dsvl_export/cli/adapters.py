"""Commands that change the switchable adapters of a bundle: ``add-adapter``, ``remove-adapter``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import bundle_adapters
from dsvl_export.cli.options import BundleFolder, Json
from dsvl_export.cli.terminal import say


@command("add-adapter")
def add_adapter(
    bundle: BundleFolder,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=FOLDER[=WEIGHT]...",
            help="Name, and the folder or hub id of a LoRA adapter in PEFT's layout; WEIGHT multiplies its"
            " change.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Add LoRA adapters to a bundle that was exported with --switchable; nothing is built again.

    'run', 'chat' and 'bench' select an adapter with --adapter NAME, and 'serve' answers with it as
    the model NAME. An adapter of the same name is replaced. An adapter that changes more than
    linear layers of the decoder is refused: 'export --adapter' merges it into the weights.

    Example: dsvl-export add-adapter my-bundle german=my-adapter
    """
    from dsvl_export.cli import display
    from dsvl_export.exporter.adapters import add_adapters, parse_named

    named = parse_named(adapters)
    with display.export_progress() as report:
        added = add_adapters(bundle, named, report)
    if as_json:
        display.print_json([asdict(item) for item in added])
        return
    for item in added:
        say(f"Added {item.name} (rank {item.rank}) to {item.backend} {item.precision}.")
    say(f'Next: dsvl-export run {bundle} --adapter {added[0].name} --prompt "Hello"')


@command("remove-adapter")
def remove_adapter(
    bundle: BundleFolder,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Names of adapters.", autocompletion=bundle_adapters),
    ],
    as_json: Json = False,
) -> None:
    """Remove LoRA adapters from a bundle.

    Example: dsvl-export remove-adapter my-bundle german
    """
    from dsvl_export.cli import display
    from dsvl_export.exporter.adapters import remove_adapters

    removed = remove_adapters(bundle, names)
    if as_json:
        display.print_json([asdict(item) for item in removed])
        return
    for item in removed:
        say(f"Removed {item.name} from {item.backend} {item.precision}.")
