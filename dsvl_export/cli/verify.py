"""The command ``verify``, which checks the files of a bundle and what they contain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import bundle_backends, bundle_precisions, values
from dsvl_export.cli.options import Adapters, BundleFolder, Json
from dsvl_export.cli.terminal import say
from runtimes.errors import UserError

if TYPE_CHECKING:
    from dsvl_export.audit import Audit
    from runtimes.bundle.bundle import Bundle


@command("verify")
def verify(
    bundle: BundleFolder,
    weights: Annotated[
        Optional[str],
        typer.Option(
            metavar="CHECKPOINT",
            help="Also compare every weight, constant and setting in the files with the values computed from"
            " this checkpoint and the precision plans. Needs PyTorch.",
            autocompletion=values("tiny"),
        ),
    ] = None,
    adapter: Adapters = None,
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="With --weights: audit only this backend. Default: all.", autocompletion=bundle_backends()
        ),
    ] = None,
    precision: Annotated[
        Optional[str],
        typer.Option(
            help="With --weights: audit only this precision. Default: all.",
            autocompletion=bundle_precisions(),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the size and SHA-256 of every file of a bundle, and that its engines fit this GPU.

    With --weights, the content is checked too. Exit code 1: a file differs from the checkpoint; 3:
    a file could not be audited.

    Example: dsvl-export verify tiny-bundle --weights tiny
    """
    from dsvl_export.cli import display
    from runtimes.backends.engines.backend import engine_problems
    from runtimes.bundle.bundle import Bundle

    if weights is None and (backend or precision or adapter):
        raise UserError(
            "--backend, --precision and --adapter belong to --weights; pass --weights CHECKPOINT too."
        )
    opened = Bundle.open(bundle)
    problems = opened.problems() + engine_problems(opened)
    report: dict[str, Any] = {
        "bundle": str(bundle), "files": len(opened.manifest.files), "problems": problems,
    }  # fmt: skip
    if problems:
        if as_json:
            display.print_json(report)
        raise UserError(
            f"The bundle {bundle} is damaged or does not fit this machine: {'; '.join(problems)}."
        )
    result = _audit(opened, weights, adapter or (), backend, precision) if weights else None
    if as_json:
        display.print_json({**report, **({"audit": result.to_dict()} if result else {})})
    else:
        say(f"All {len(opened.manifest.files)} files of {bundle} are unchanged since the export.")
        if result:
            display.print_audit(result)
    if result and result.exit_code:
        raise typer.Exit(result.exit_code)


def _audit(
    bundle: Bundle, checkpoint: str, adapters: Sequence[str], backend: str | None, precision: str | None
) -> Audit:
    """Compare the files of a bundle with a checkpoint, with a progress bar."""
    from dsvl_export.audit import audit
    from dsvl_export.cli import display
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.checkpoint.lora_adapter import parse_adapters

    source = open_checkpoint(
        checkpoint,
        adapters=parse_adapters(adapters),
        built_in_prompt=bundle.manifest.prompt.keeps_built_in,
    )
    done = 0
    with display.step_bar("audit") as on_step:

        def on_bytes(part: str, count: int) -> None:
            nonlocal done
            done += count
            on_step(part, min(done, total), total)

        total = sum(entry.bytes for entry in bundle.manifest.files.values())
        on_step("hash of the checkpoint", 0, total)
        return audit(bundle, source, backend, precision, on_bytes)
