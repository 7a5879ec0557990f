"""The command ``bench``, which measures speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    Adapter,
    Backend,
    BundleFolder,
    Device,
    Json,
    Precision,
    Threads,
    TrustEngine,
)


@command("bench")
def bench(
    bundle: BundleFolder,
    backend: Backend = None,
    precision: Precision = None,
    adapter: Adapter = None,
    image: Annotated[
        Optional[Path],
        typer.Option("--image", "-i", help="Image to ask about. Default: random pixels."),
    ] = None,
    contexts: Annotated[
        Optional[list[int]],
        typer.Option(
            "--context",
            min=1,
            help="Number of tokens in the KV cache when decoding starts, repeatable. Default: those of 128,"
            " 512, 1024 and 2048 that fit.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to decode at each context.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements, after one warm-up.")] = 3,
    report: Annotated[
        Optional[Path],
        typer.Option("--report", metavar="FOLDER", help="Write a JSON file and a plot to it."),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Measure the time to first token and the decoding speed, with the memory-bandwidth bound.

    The bound is the measured memory bandwidth divided by the bytes that a token reads. If PyTorch
    is installed, the prediction of 'plan' is shown too.

    Example: dsvl-export bench tiny-bundle --precision fp32 --report bench
    """
    from rich.markup import escape

    from dsvl_export.bench.bench import BenchOptions
    from dsvl_export.bench.bench import bench as run_bench
    from dsvl_export.cli import display
    from dsvl_export.cli.display_bench import print_bench, write_bench
    from runtimes.backends.engines.trust import trust_engines
    from runtimes.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    if trust_engine:
        trust_engines(opened)
    room = max(contexts or [0]) + tokens
    capacity = room if room > opened.manifest.default_capacity else None
    warn_of_memory(opened, *opened.select(backend, precision, adapter), device, capacity)
    options = BenchOptions(threads, device, image, tuple(contexts or ()), tokens, repeats, adapter)
    with display.step_bar("bench") as on_step:
        result = run_bench(bundle, backend, precision, options, on_step)
    if as_json:
        display.print_json(result.to_dict())
    else:
        print_bench(result)
    if report:
        for file in write_bench(result, report):
            display.err.print(f"Wrote {escape(str(file))}.")
