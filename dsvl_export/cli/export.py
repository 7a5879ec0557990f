"""The command ``export``, which writes a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import complete_backends, complete_precisions, complete_targets, values
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    Adapters,
    ChatTemplate,
    Components,
    Json,
    OptionalCheckpoint,
    component_values,
)
from dsvl_export.cli.parity import exit_with_verdict, run_and_record
from dsvl_export.cli.terminal import say

if TYPE_CHECKING:
    from dsvl_export.parity_check import ParityResult
    from dsvl_export.parity_check.against_reference import OnStep
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.mixes import Pair

# Panels of the help of ``export``.
BACKEND_OPTIONS = "Options of one backend"
CHECKS = "Checks"


@command("export")
def export(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Bundle folder: a new or empty folder, or a bundle to add artifacts to."
        ),
    ],
    checkpoint: OptionalCheckpoint = None,
    adapter: Adapters = None,
    chat_template: ChatTemplate = None,
    config: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="YAML file of an export config, for example one that a bundle keeps. Arguments and options"
            " override it.",
        ),
    ] = None,
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="onnxruntime, openvino, tensorrt, tensorrt_rtx, coreml, coreai or executorch; auto selects"
            " the fastest one for each component, of those that pass the parity check on this machine, or by"
            " the bounds of 'plan' for another --target. Default: the first backend of the target, or"
            " onnxruntime.",
            autocompletion=complete_backends,
        ),
    ] = None,
    precision: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Precision, repeatable: fp32, fp16, bf16, int8, fp8, int4, int8-int4, int8-weights,"
            " palette4, kv-int8, 8da4w, 8da4w-g128, 8da8w, or the YAML file of a precision plan. With"
            " --backend auto, these are the ones to choose from, by default the float precisions. Default:"
            " fp32, or fp16 if the backend does not support fp32.",
            autocompletion=complete_precisions,
        ),
    ] = None,
    component: Components = None,
    scales: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Folder with the scale table that 'calibrate' wrote. Default: if the precision needs scales,"
            " calibrate on the bundled images.",
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(
            help="Target device, one of those that 'targets' lists. An export that the device cannot run is"
            " refused before it starts.",
            autocompletion=complete_targets,
        ),
    ] = None,
    tensorrt: Annotated[
        Optional[str],
        typer.Option(
            metavar="VERSION",
            help="Version of TensorRT that builds the engines, for example 10.3. Default: the target's, or"
            " 11.4.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    sm: Annotated[
        Optional[list[int]],
        typer.Option(
            help="Compute capability to build tensorrt_rtx engines for, repeatable. Default: 86, 89 and 120.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    capacity: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Capacity of the KV cache, in tokens; fixed at export in engines and Apple packages."
            " Default: 2048, or the model's number of positions if that is smaller.",
        ),
    ] = None,
    delegate: Annotated[
        Optional[str],
        typer.Option(
            help="ExecuTorch delegate for the encoders: xnnpack (the default), coreml or vulkan. Only a"
            " device can run coreml and vulkan.",
            rich_help_panel=BACKEND_OPTIONS,
            autocompletion=values("xnnpack", "coreml", "vulkan"),
        ),
    ] = None,
    prefill: Annotated[
        Optional[bool],
        typer.Option(
            "--prefill/--no-prefill",
            help="With onnxruntime and 8da4w, add a second decoder with 8-bit weights for prefill: prefill is"
            " twice as fast, and the decoder takes three times the disk space and memory. Default:"
            " --prefill.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    switchable: Annotated[
        Optional[bool],
        typer.Option(
            "--switchable/--no-switchable",
            help="With onnxruntime, add a decoder graph for LoRA adapters that are selected at run time; it"
            " shares the weights. 'add-adapter' adds adapters to the bundle. Default: --no-switchable, or"
            " --switchable if there are switchable adapters.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    switchable_adapter: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAME=FOLDER[=WEIGHT]",
            help="With onnxruntime, LoRA adapter that is selected at run time by NAME, repeatable; implies"
            " --switchable. It may change linear layers of the decoder only.",
            rich_help_panel=BACKEND_OPTIONS,
        ),
    ] = None,
    goldens: Annotated[
        Optional[bool],
        typer.Option(
            "--goldens/--no-goldens",
            help="Record reference outputs for 'parity', and compare the written files with the checkpoint."
            " Default: --goldens.",
            rich_help_panel=CHECKS,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--parity/--no-parity", help="Run the parity check on the bundle.", rich_help_panel=CHECKS
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint into a bundle.

    The parity check compares the bundle with the PyTorch reference. If the export is interrupted,
    run the same command again: the export resumes.

    Exit code 0: all stages passed; 1: the bundle differs from the reference, or the precision
    overflows; 3: the parity check could not judge the bundle on this machine.

    Example: dsvl-export export tiny --precision fp16 --output tiny-bundle

    Example: dsvl-export export --config export.yaml --precision int8 --output my-bundle

    Example: dsvl-export export tiny --component vision_encoder=openvino:bf16 --component
    decoder=onnxruntime:8da4w-g128 --output tiny-mix
    """
    from rich.markup import escape

    from dsvl_export.cli import display
    from dsvl_export.exporter.config import AUTO, ExportConfig
    from dsvl_export.exporter.export import export_bundle
    from dsvl_export.exporter.manifest import takes_adapters
    from dsvl_export.exporter.variants import list_variants
    from dsvl_export.targets.defects import warnings_for
    from dsvl_export.targets.targets import find_target
    from runtimes.backends.executorch_tokenizer import RUNNER_TOKENIZER
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.manifest import MANIFEST
    from runtimes.errors import UserError
    from runtimes.units import size

    if config is not None:
        settings = ExportConfig.read(config, checkpoint)
    elif checkpoint is not None:
        settings = ExportConfig(checkpoint)
    else:
        raise UserError("There is no checkpoint to export; give CHECKPOINT or --config.")
    settings = settings.override(
        {
            "adapters": tuple(adapter or ()),
            "chat_template": chat_template,
            "backend": backend,
            "precisions": tuple(precision or ()),
            **{f"components.{name}": text for name, text in component_values(component).items()},
            "target": target,
            "capacity": capacity,
            "scales": str(scales) if scales else None,
            "goldens": goldens,
            "onnxruntime.prefill": prefill,
            "onnxruntime.switchable": switchable,
            "switchable_adapters": tuple(switchable_adapter or ()),
            "tensorrt.version": tensorrt,
            "tensorrt.capabilities": tuple(sm or ()),
            "executorch.delegate": delegate,
        }
    )
    fastest = None
    if settings.backend == AUTO:
        from dsvl_export.cli.display_planning import print_candidates
        from dsvl_export.exporter.fastest import export_fastest

        with display.export_progress() as report, _hint_of_resuming():
            fastest = export_fastest(settings, output, report)
        print_candidates(fastest, display.err)
        settings = fastest.config
    settings = settings.with_defaults()
    variants = list_variants(settings)
    parts = [part for variant in variants for part in variant.parts]
    device_name = find_target(settings.target).name if settings.target else None
    defects = {
        str(row): None for part in parts for row in warnings_for(part.backend, part.plan.name, device_name)
    }
    for text in defects:
        display.err.print(f"[yellow]Known defect:[/] {escape(text)}")
    uses_bundled_images = settings.scales is None and settings.checkpoint != "tiny"
    if uses_bundled_images and any(part.plan.quantizes_activations for part in parts):
        display.err.print(
            "[yellow]Calibrating on the bundled images.[/] For better scales, run 'dsvl-export calibrate'"
            " on your own images and pass the result as --scales."
        )
    before = Bundle.open(output).manifest if (output / MANIFEST).exists() else None
    earlier, mixes = (before.adapters, before.mixes) if before else ((), ())
    if fastest:
        bundle = fastest.bundle
    else:
        with display.export_progress() as report, _hint_of_resuming():
            bundle = export_bundle(settings, output, report)
    for item in earlier:
        if item.file not in bundle.manifest.files:
            remedy = "add it again with 'dsvl-export add-adapter'"
            able = {(a.backend, a.precision) for a in bundle.manifest.artifacts if takes_adapters(a)}
            if (item.backend, item.precision) not in able:
                remedy = "export again with --switchable, then add it again with 'dsvl-export add-adapter'"
            display.err.print(
                f"[yellow]Removed the adapter {escape(item.file)}:[/] the decoder was exported anew;"
                f" {remedy}."
            )
    for mix in mixes:
        if mix not in bundle.manifest.mixes:
            display.err.print(
                f"[yellow]Removed the mix {escape(mix.name)}:[/] its components do not fit each other any"
                " more."
            )
    pairs = [(variant.backend, variant.precision) for variant in variants]
    for pair in pairs:
        tokenizer = bundle.artifact("decoder", *pair).tools.get(RUNNER_TOKENIZER, "")
        if tokenizer.startswith("none"):
            display.err.print(
                f"[yellow]No tokenizer for ExecuTorch's runner ({pair[1]}):[/] {escape(tokenizer[6:])}."
                " Apps must pass token ids to the runner instead of text; see docs/tutorials/executorch.md."
            )
    verdicts = [
        run_and_record(output, " ".join(pair), partial(_run_parity, *pair))
        for pair in pairs
        if check and settings.goldens
    ]
    results = [result for _, result in verdicts]
    if as_json:
        bundle = Bundle.open(output)  # with the verdicts
        documents = [document for document, _ in verdicts]
        row = {"bundle": str(bundle.folder), "manifest": bundle.manifest.to_dict(), "parity": documents}
        candidates = {"candidates": list(map(asdict, fastest.candidates))} if fastest else {}
        display.print_json({**row, **candidates})
    else:
        for result in results:
            display.print_parity(result)
        total = sum(entry.bytes for entry in bundle.manifest.files.values())
        say(f"Wrote {bundle.folder} ({size(total)}).")
        for remark in bundle.manifest.checkpoint.get("remarks", []):
            say(f"Note: {remark}")
        if difference := bundle.manifest.prompt.template_difference:
            say(f"Warning: {difference}")
        if needs := _needs(bundle, pairs):
            say(needs)
        say(f"Next: {_next_step(bundle, pairs[0])}")
    exit_with_verdict(results)


@contextmanager
def _hint_of_resuming() -> Iterator[None]:
    """Say that an export resumes if the user interrupts it."""
    from dsvl_export.cli import display

    try:
        yield
    except KeyboardInterrupt:
        display.err.print("Run the same command again: the export resumes.")
        raise


def _needs(bundle: Bundle, pairs: list[Pair]) -> str:
    """Return the oldest ONNX Runtime for the artifacts as a sentence; empty if none runs them."""
    from runtimes.backends.onnxruntime_releases import NEEDED, newest_release

    items = [item for pair in pairs for item in bundle.artifacts(*pair).values() if NEEDED in item.tools]
    where = "" if any(item.backend == "onnxruntime" for item in items) else " to run without a GPU"
    releases = [item.tools[NEEDED] for item in items]
    return f"Needs ONNX Runtime {newest_release(releases)} or later{where}." if releases else ""


def _next_step(bundle: Bundle, pair: Pair) -> str:
    """Return the command to run after an export."""
    backends = {item.backend for item in bundle.artifacts(*pair).values()}
    choice = " --backend {} --precision {}".format(*pair) if bundle.choices()[0] != pair else ""
    ask = f'dsvl-export run {bundle.folder}{choice} --image IMAGE --prompt "Describe the picture."'
    if "tensorrt" in backends:
        return f"copy {bundle.folder} to the device and run: dsvl-export build-engine {bundle.folder.name}"
    if "tensorrt_rtx" in backends:
        return f"{ask} (on a machine without a GPU: with --device cpu)"
    return ask


def _run_parity(backend: str, precision: str, bundle: Bundle, on_step: OnStep) -> ParityResult:
    """Run the parity check of one precision."""
    from dsvl_export.parity_check import parity

    warn_of_memory(bundle, backend, precision)
    return parity(bundle, backend, precision, on_step=on_step)
