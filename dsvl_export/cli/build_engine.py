"""The command ``build-engine``, which builds TensorRT engines on the machine that runs them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.options import BundleFolder, Json, Precision
from dsvl_export.cli.terminal import say


@command("build-engine")
def build_engine(
    bundle: BundleFolder,
    precision: Precision = None,
    capacity: Annotated[
        Optional[int], typer.Option(min=1, help="Capacity of the KV cache, in tokens. Default: the bundle's.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum number of sequences in a decode call.")] = 8,
    workspace: Annotated[
        Optional[float],
        typer.Option(min=0, metavar="MB", help="Maximum scratch memory of a kernel. Default: no limit."),
    ] = None,
    timing_cache: Annotated[
        Optional[Path],
        typer.Option(help="File that keeps kernel timings between builds, so that later builds are faster."),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build engines that later releases of the same TensorRT major version can run.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Build slower engines that run on every GPU from Ampere on. Not supported on Jetson.",
        ),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Keep weights that do not fit in GPU memory in host memory."),
    ] = False,
    dla_core: Annotated[
        Optional[int],
        typer.Option(
            min=0, help="Run the vision encoder on this DLA core of a Jetson; the rest runs on the GPU."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines for the GPU of this machine from a bundle.

    PyTorch and the checkpoint are not needed. The engines are added to the bundle, which records
    their GPU and TensorRT version. Engines that exist are kept. If the build is interrupted, run
    the same command again: it resumes.

    Example: dsvl-export build-engine tiny-bundle --timing-cache jetson.timing
    """
    from dsvl_export.cli import display
    from dsvl_export.compilers.engines.build import EngineSettings
    from dsvl_export.exporter.build_engines import build_engines, longest_golden
    from dsvl_export.exporter.staging import Staging
    from runtimes.bundle.bundle import Bundle
    from runtimes.units import size

    opened = Staging(bundle).bundle()
    settings = EngineSettings(
        capacity=capacity or opened.manifest.default_capacity,
        max_batch=max_batch,
        workspace_bytes=round(workspace * 1e6) if workspace is not None else None,
        timing_cache=timing_cache.expanduser() if timing_cache else None,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        weight_streaming=weight_streaming,
        dla_core=dla_core,
    )
    needed = longest_golden(opened)
    if needed > settings.capacity:
        display.err.print(
            f"[yellow]The longest golden of the bundle needs a capacity of {needed} tokens, but the capacity"
            f" is {settings.capacity}.[/] The parity check leaves out goldens that do not fit."
        )
    with display.step_bar("build-engine") as on_step:
        built = build_engines(bundle, settings, precision, on_step=on_step)
    if as_json:
        display.print_json([asdict(item) for item in built])
        return
    for item in built:
        written = Bundle.open(bundle).manifest.files[item.files[-1]].bytes
        say(f"{item.files[-1]} ({size(written)})")
    say(f"Next: dsvl-export parity {bundle} --backend tensorrt")
