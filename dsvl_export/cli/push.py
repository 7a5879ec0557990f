"""The command that publishes a bundle: ``push``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.options import BundleFolder, Json
from dsvl_export.cli.terminal import say


@command("push")
def push(
    bundle: BundleFolder,
    repository: Annotated[
        str, typer.Argument(help="Hub id to publish as, ORG/NAME or ORG/NAME@BRANCH.", metavar="ORG/NAME")
    ],
    base_model: Annotated[
        Optional[str],
        typer.Option(
            metavar="ORG/NAME",
            help="Hub id of the exported checkpoint, for the model card. Default: as recorded in the bundle.",
        ),
    ] = None,
    license: Annotated[
        Optional[str],
        typer.Option(
            help="License identifier of the hub, such as mit, for the model card. Default: DeepSeek's model"
            " license.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload with dsvl-export",
    as_json: Json = False,
) -> None:
    """Publish a bundle on the Hugging Face Hub, with a model card.

    All files are checked against their hashes and uploaded in one commit. Log in with HF_TOKEN or
    'hf auth login'. Configs and parity reports are published too; they name folders of your
    machine.

    Example: dsvl-export push my-bundle my-org/deepseek-vl-7b-jetson --base-model
    deepseek-ai/deepseek-vl-7b-chat
    """
    from dsvl_export.cli import display
    from dsvl_export.publish.model_card import CardOptions
    from dsvl_export.publish.push import parse_repository
    from dsvl_export.publish.push import push as run_push
    from runtimes.bundle.bundle import Bundle

    hub_id = parse_repository(repository)
    opened = Bundle.open(bundle)
    recorded = opened.manifest.checkpoint.get("origin", "").partition("@")[0] or None
    options = CardOptions(base_model or recorded, license)
    address = run_push(opened, hub_id, options, private=private, message=message)
    if as_json:
        display.print_json({"repository": hub_id.repository, "commit": address})
    else:
        say(f"Published as {address}.")
