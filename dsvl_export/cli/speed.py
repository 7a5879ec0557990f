"""The command that measures speed: ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from dsvl_export.cli.app import app
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import Backend, BundleFolder, Device, Json, Precision, Threads, TrustEngine


@app.command()
def bench(
    bundle: BundleFolder,
    backend: Backend = None,
    precision: Precision = None,
    image: Annotated[
        Optional[Path],
        typer.Option("--image", "-i", help="Picture to ask about; default: one of noise."),
    ] = None,
    contexts: Annotated[
        Optional[list[int]],
        typer.Option(
            "--context",
            min=1,
            help="Tokens before those that are decoded, repeatable. Default: 128, 512, 1024"
            " and 2048, as far as the decoder holds them.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode at each context.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, after one that is not counted.")] = 3,
    report: Annotated[
        Optional[Path],
        typer.Option("--report", metavar="FOLDER", help="Write JSON and a plot there."),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Measure time to first token by stage and decoding by context, beside the machine's roof.

    The roof is the memory bandwidth, measured here, over the bytes that a token reads. With PyTorch
    installed, the prediction of 'plan' stands beside it.

    Example: dsvl-export bench tiny-bundle --precision fp32 --report bench
    """
    from dsvl_export import display
    from dsvl_export.benching import BenchOptions
    from dsvl_export.benching import bench as run_bench
    from dsvl_export.display_bench import print_bench, write_bench
    from runtimes.bundle import Bundle
    from runtimes.engines.trust import trust_engines

    opened = Bundle.open(bundle)
    if trust_engine:
        trust_engines(opened)
    room = max(contexts or [0]) + tokens
    capacity = room if room > opened.manifest.default_capacity else None
    warn_of_memory(opened, *opened.select(backend, precision), device, capacity)
    options = BenchOptions(threads, device, image, tuple(contexts or ()), tokens, repeats)
    with display.step_bar("bench") as on_step:
        result = run_bench(bundle, backend, precision, options, on_step)
    if as_json:
        display.print_json(result.to_dict())
    else:
        print_bench(result)
    if report:
        for file in write_bench(result, report):
            display.err.print(f"Wrote {escape(str(file))}.")
