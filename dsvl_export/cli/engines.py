"""Commands around TensorRT: ``lint`` and ``build-engine``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import app
from dsvl_export.cli.options import BundleFolder, Json, Precision
from dsvl_export.terminal import say


@app.command()
def lint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, or an ONNX file of any origin.")],
    tensorrt: Annotated[
        Optional[str],
        typer.Option(
            metavar="VERSION", help="TensorRT's version, as in 10.3. Default: the bundle's, or 11.4."
        ),
    ] = None,
    target: Annotated[
        Optional[str], typer.Option(help="Device, as 'targets' lists them: its TensorRT and its GPU.")
    ] = None,
    sm: Annotated[
        Optional[int], typer.Option(help="Compute capability, as in 87. Default: the target's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what TensorRT would refuse of ONNX files, before any build: node, rule and remedy.

    Of a bundle, files for other runtimes are listed as not checked. Without --target, --tensorrt and --sm,
    the rules of quantization are tried on files for ONNX Runtime.

    Exit code 1: something would be refused, or taken for something else; 3: nothing could be checked.

    Example: dsvl-export lint model.onnx --target jetson-orin
    """
    from dsvl_export import display
    from dsvl_export.linting import lint_path, summary

    found = lint_path(path, tensorrt, target, sm)
    if as_json:
        display.print_json(
            {str(file): [vars(finding) for finding in findings] for file, findings in found.items()}
        )
    else:
        for file, findings in found.items():
            for finding in findings:
                word = "" if finding.harmful else f"{finding.effect}: "
                say(f"{file}: {word}{finding}")
        print(summary(found))
    checked = [findings for findings in found.values() if all(finding.checked for finding in findings)]
    if any(finding.harmful for findings in checked for finding in findings):
        raise typer.Exit(1)
    if not checked:
        raise typer.Exit(3)


@app.command("build-engine")
def build_engine(
    bundle: BundleFolder,
    precision: Precision = None,
    capacity: Annotated[
        Optional[int], typer.Option(min=1, help="Tokens of the KV cache. Default: the bundle's.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together at most.")] = 8,
    workspace: Annotated[
        Optional[float],
        typer.Option(min=0, metavar="MB", help="Scratch memory that a kernel may take. Default: no limit."),
    ] = None,
    timing_cache: Annotated[
        Optional[Path],
        typer.Option(help="File with kernels' times: a second build takes a fraction of the first."),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Runs on later TensorRT of the same major version too."),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="Runs on every GPU from Ampere on; slower. Not on Jetson."
        ),
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights that do not fit stay in the host's memory.")
    ] = False,
    dla_core: Annotated[
        Optional[int],
        typer.Option(min=0, help="Vision encoder on this DLA of a Jetson; the rest falls back to the GPU."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines for this machine's GPU from a bundle; no PyTorch, no checkpoint.

    The engines go into the bundle, with the GPU and the TensorRT they are for. What is built already is
    kept; the same command goes on after an interruption.

    Example: dsvl-export build-engine tiny-bundle --timing-cache jetson.timing
    """
    from dsvl_export import display
    from dsvl_export.engines.building import EngineSettings
    from dsvl_export.engines.on_device import build_engines, longest_golden
    from dsvl_export.staging import Staging
    from dsvl_export.units import size
    from runtimes.bundle import Bundle

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
            f"[yellow]The bundle's longest golden needs a capacity of {needed}, not {settings.capacity};"
            " parity will leave out what does not fit.[/]"
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
