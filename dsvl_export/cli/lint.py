"""The command ``lint``, which finds what TensorRT refuses in ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import complete_targets
from dsvl_export.cli.options import Json
from dsvl_export.cli.terminal import say


@command("lint")
def lint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, or any ONNX file.")],
    tensorrt: Annotated[
        Optional[str],
        typer.Option(
            metavar="VERSION", help="Version of TensorRT, for example 10.3. Default: the bundle's, or 11.4."
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(
            help="Target device, one of those that 'targets' lists; sets the TensorRT version and the GPU.",
            autocompletion=complete_targets,
        ),
    ] = None,
    sm: Annotated[
        Optional[int], typer.Option(help="Compute capability, for example 87. Default: the target's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what TensorRT refuses in ONNX files before a build: node, rule and fix.

    Files of a bundle that are for other runtimes are listed as not checked. Without --target,
    --tensorrt and --sm, files for ONNX Runtime are checked with the quantization rules.

    Exit code 1: TensorRT would refuse or misinterpret a node; 3: no file could be checked.

    Example: dsvl-export lint model.onnx --target jetson-orin
    """
    from dsvl_export.cli import display
    from dsvl_export.lint.bundles import lint_path, summarize_findings

    results = lint_path(path, tensorrt, target, sm)
    if as_json:
        display.print_json(
            {str(file): [vars(finding) for finding in findings] for file, findings in results.items()}
        )
    else:
        for file, findings in results.items():
            for finding in findings:
                word = "" if finding.harmful else f"{finding.effect}: "
                say(f"{file}: {word}{finding}")
        print(summarize_findings(results))
    checked = [findings for findings in results.values() if all(finding.checked for finding in findings)]
    if any(finding.harmful for findings in checked for finding in findings):
        raise typer.Exit(1)
    if not checked:
        raise typer.Exit(3)
