"""Commands that plan a deployment: ``doctor``, ``targets`` and ``plan``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import complete_backends, complete_precisions, complete_targets
from dsvl_export.cli.options import Checkpoint, Components, Json, component_values

DEFAULT_PRECISION = "fp16"


@command("doctor")
def doctor(as_json: Json = False) -> None:
    """Show what this machine can export and run, what is missing, and which known defects apply.

    Exit code 1: no backend runs here, or the installed versions are known to be incompatible.
    """
    from dsvl_export.cli.display import print_json
    from dsvl_export.cli.display_planning import print_diagnosis
    from dsvl_export.planning.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis)
    else:
        print_diagnosis(diagnosis)
    if not diagnosis["healthy"]:
        raise typer.Exit(1)


@command("targets")
def targets(as_json: Json = False) -> None:
    """List the target devices with memory, speed, backends and precisions."""
    from dataclasses import asdict

    from dsvl_export.cli.display import out, print_json
    from dsvl_export.cli.display_planning import target_table
    from dsvl_export.targets.targets import load_targets

    table = load_targets()
    if as_json:
        print_json({name: asdict(target) for name, target in table.items()})
    else:
        out.print(target_table(table))


@command("plan")
def plan(
    checkpoint: Checkpoint,
    target: Annotated[
        str,
        typer.Option(
            help="Target device, one of those that 'targets' lists.", autocompletion=complete_targets
        ),
    ] = "cpu",
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="Backend. Default: the first backend of the target.", autocompletion=complete_backends
        ),
    ] = None,
    precision: Annotated[
        Optional[str],
        typer.Option(
            help="Precision, as for 'export': a name, or the YAML file of a precision plan. Default: fp16.",
            autocompletion=complete_precisions,
        ),
    ] = None,
    component: Components = None,
    context: Annotated[
        Optional[int], typer.Option(min=1, help="Capacity of the KV cache, in tokens. Default: 2048.")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Number of images in the prompt.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=1, help="Number of text tokens in the prompt.")] = 100,
    as_json: Json = False,
) -> None:
    """Predict size, memory, time to first token and tokens per second of an export.

    Only the config of the checkpoint is needed. Sizes are computed from the traced program. Times
    are roofline bounds, so the device can at best reach them.

    Exit code 1: the model does not fit into the memory of the target; 2: the target cannot run the
    model in this precision. Both name the nearest alternative.

    Example: dsvl-export plan my-checkpoint --target jetson-agx-orin --precision int4 --context 4096
    """
    from dsvl_export.cli import display
    from dsvl_export.cli.display_planning import print_plan
    from dsvl_export.exporter.config import ComponentChoices, parse_choice
    from dsvl_export.exporter.export import MAX_DEFAULT_CAPACITY
    from dsvl_export.planning.plan import Planner, Request
    from dsvl_export.targets.defects import warnings_for
    from dsvl_export.targets.targets import find_target, measure_target
    from reference.checkpoint.checkpoint import open_checkpoint
    from runtimes.bundle.mixes import MIXED, Mix, Pair

    device = find_target(target)
    given = bool(backend or precision)
    backend, precision = backend or next(iter(device.backends)), precision or DEFAULT_PRECISION
    components: dict[str, Pair] = {}
    if component:
        choices = ComponentChoices(**component_values(component))
        chosen = choices.filled(f"{backend}:{precision}" if given else None).chosen()
        components = {name: parse_choice(name, text) for name, text in chosen.items()}
        backend, precision = MIXED, Mix(**components).name
    source = open_checkpoint(checkpoint, weights=False)
    context = context or min(MAX_DEFAULT_CAPACITY, source.config.decoder.max_positions)
    request = Request(backend, precision, context, images, text_tokens, components)
    with display.progress_bar() as bars:
        bar = bars.add_task("measuring", total=None)
        device = measure_target(device)
        planner = Planner(
            source.config,
            source.embedding_bytes(),
            lambda name: bars.update(bar, description=f"tracing the {name}"),
        )
        predicted = planner.plan(device, request)
        nearest = None if predicted.fits else planner.nearest_fit(device, request)
    pairs = dict.fromkeys(components.values()) or [(backend, precision)]
    defects = [defect for pair in pairs for defect in warnings_for(*pair, target, context)]
    if as_json:
        rows = [{"id": d.id, "what": d.what, "do": d.do, "link": d.link} for d in defects]
        display.print_json({**predicted.to_dict(), "nearest_precision_that_fits": nearest, "warnings": rows})
    else:
        print_plan(predicted, nearest, defects)
    if not predicted.fits:
        raise typer.Exit(1)
