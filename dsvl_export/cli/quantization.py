"""Commands for quantization: ``calibrate``, ``sensitivity`` and ``plan-precision``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import complete_precisions, values
from dsvl_export.cli.options import Adapters, ChatTemplate, Checkpoint, Json, Ray
from dsvl_export.cli.terminal import say
from runtimes.errors import UserError
from runtimes.installation import install_command

Data = Annotated[
    str,
    typer.Option(
        help="A folder of images, a JSONL file with image(s) and prompt(s) on each line, or 'bundled':"
        " 128 questions about rendered images.",
        autocompletion=values("bundled"),
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Maximum number of samples, drawn at random.")]
Seed = Annotated[int, typer.Option(help="Seed for drawing the samples.")]
Scales = Annotated[
    Optional[Path],
    typer.Option(metavar="FOLDER", help="Folder with the scale table that 'calibrate' wrote."),
]


@command("calibrate")
def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the scale table.")],
    adapter: Adapters = None,
    chat_template: ChatTemplate = None,
    data: Data = "bundled",
    samples: Samples = 128,
    seed: Seed = 0,
    method: Annotated[
        str,
        typer.Option(
            help="Method that chooses INT8 ranges: minmax, percentile or mse.",
            autocompletion=values("minmax", "percentile", "mse"),
        ),
    ] = "mse",
    percentile: Annotated[
        float, typer.Option(help="With --method percentile: the percentile, in percent.")
    ] = 99.99,
    tune: Annotated[
        Optional[str],
        typer.Option(
            metavar="PRECISION",
            help="Precision or plan to tune for: smooth its layers (SmoothQuant, AWQ), and round its weights"
            " with GPTQ.",
            autocompletion=complete_precisions,
        ),
    ] = None,
    smooth: Annotated[
        bool, typer.Option("--smooth/--no-smooth", help="With --tune: search smoothing factors.")
    ] = True,
    gptq: Annotated[
        bool, typer.Option("--gptq/--no-gptq", help="With --tune: round 4-bit weights with GPTQ.")
    ] = True,
    rows: Annotated[int, typer.Option(min=0, help="With --tune: rows to keep of each activation.")] = 512,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Use only part I of N of the data, to share the work among machines."
        ),
    ] = "1/1",
    merge: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="FOLDER", help="Merge the statistics in these folders instead of running the data."
        ),
    ] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Find the scales of all activations and of the KV cache, once for all backends.

    Images and prompts run through the whole fp32 model on the CPU, followed by the model's own
    answers. If the run is interrupted, run the same command again: it resumes.

    Example: dsvl-export calibrate tiny --data my-images --output scales, then dsvl-export export
    tiny --precision int8 --scales scales --output bundle
    """
    from rich.markup import escape

    from dsvl_export.cli import display
    from dsvl_export.cluster.ray_cluster import ray_cluster
    from dsvl_export.quantization.calibrate import CalibrationOptions
    from dsvl_export.quantization.calibrate import calibrate as run_calibrate
    from reference.checkpoint.chat_template import wants_built_in
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.checkpoint.lora_adapter import parse_adapters

    options = CalibrationOptions(
        data, samples, seed, _part(part), method, percentile, rows, tune, smooth, gptq
    )
    source = open_checkpoint(
        checkpoint,
        adapters=parse_adapters(adapter or ()),
        built_in_prompt=wants_built_in(chat_template),
    )
    with ray_cluster(ray) as spread, display.step_bar("calibrate") as on_step:
        result = run_calibrate(source, output.expanduser(), options, merge or (), on_step, spread)
    for image in result.skipped:
        display.err.print(f"[yellow]Skipped an unreadable image:[/] {escape(image)}")
    table = result.table
    if as_json:
        display.print_json(
            {
                "output": str(output),
                "samples": table.samples,
                "skipped": list(result.skipped),
                "layers": len(table.activations),
                "smoothed": sorted(table.smoothing),
                "tuned": {name: weight.precision for name, weight in table.tuned.items()},
            }
        )
        return
    say(f"Wrote {output}: scales of {len(table.activations)} layers from {table.samples} samples.")
    if tune:
        say(
            f"For {tune}: smoothed {len(table.smoothing)} layer inputs and rounded {len(table.tuned)} weights"
            " with GPTQ."
        )
    precision = f"--precision {tune or 'int8'} --scales {output}"
    named = _checkpoint_options(adapter, chat_template)
    say(f"Next: dsvl-export export {checkpoint} {named}{precision} --output BUNDLE")


def _checkpoint_options(adapters: Sequence[str] | None, chat_template: str | None) -> str:
    """Return the options of the checkpoint, with a space after each, for a command to copy."""
    options = [f"--adapter {adapter} " for adapter in adapters or ()]
    return "".join([*options, *([f"--chat-template {chat_template} "] if chat_template else [])])


def _part(text: str) -> tuple[int, int]:
    """Read ``I/N``."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"--part must have the form I/N, for example 1/4, not {text!r}.")
    return int(index), int(count)


@command("sensitivity")
def sensitivity(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for sensitivity.json and a plot.")],
    adapter: Adapters = None,
    chat_template: ChatTemplate = None,
    data: Data = "bundled",
    samples: Samples = 32,
    seed: Seed = 0,
    candidate: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Precision to measure, repeatable. Default: int4-g128, int4-g32 and int8-weights.",
            autocompletion=values("int4-g128", "int4-g32", "int8-weights"),
        ),
    ] = None,
    scales: Scales = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Measure the effect of quantizing each layer by itself: KL divergence and unchanged answers.

    If the run is interrupted, run the same command again: it resumes.
    """
    from dsvl_export.cli import display
    from dsvl_export.cli.display_quantization import sensitivity_table
    from dsvl_export.cluster.ray_cluster import ray_cluster
    from dsvl_export.quantization.search import sensitivity as run_sensitivity
    from reference.checkpoint.chat_template import wants_built_in
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.checkpoint.lora_adapter import parse_adapters

    source = open_checkpoint(
        checkpoint,
        adapters=parse_adapters(adapter or ()),
        built_in_prompt=wants_built_in(chat_template),
    )
    with ray_cluster(ray) as spread, display.step_bar("sensitivity") as on_step:
        result, plot_file = run_sensitivity(
            source, output.expanduser(), data, samples, seed, candidate, scales, on_step, spread
        )
    if as_json:
        display.print_json(
            {"rows": [vars(row) for row in result.rows], "plot": str(plot_file) if plot_file else None}
        )
        return
    display.out.print(sensitivity_table(result))
    plot = "" if plot_file else f"; for a plot: {install_command('matplotlib')}"
    say(f"Wrote {output}{plot}.")
    named = f"{checkpoint} {output} {_checkpoint_options(adapter, chat_template)}"
    say(f"Next: dsvl-export plan-precision {named}--budget kl=0.02 --output plan.yaml")


@command("plan-precision")
def plan_precision(
    checkpoint: Checkpoint,
    measured: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that 'sensitivity' wrote.")],
    budget: Annotated[
        str,
        typer.Option(
            help="kl=0.02 (nats per token), accuracy=0.99 (unchanged answers) or bytes=900M (weights)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file for the plan.")],
    adapter: Adapters = None,
    chat_template: ChatTemplate = None,
    data: Data = "bundled",
    samples: Samples = 128,
    seed: Seed = 0,
    scales: Scales = None,
    front: Annotated[
        bool, typer.Option("--front/--no-front", help="Measure and plot the Pareto front.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Find a precision for every layer within a budget, measured on held-out data.

    All commands accept the plan as --precision. A plot of the Pareto front is written next to the
    plan.

    Example: dsvl-export plan-precision tiny measured --budget accuracy=0.99 --output plan.yaml
    """
    from dsvl_export.cli import display
    from dsvl_export.cli.display_quantization import front_table
    from dsvl_export.quantization.search import find_plan
    from reference.checkpoint.chat_template import wants_built_in
    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.checkpoint.lora_adapter import parse_adapters

    source = open_checkpoint(
        checkpoint,
        adapters=parse_adapters(adapter or ()),
        built_in_prompt=wants_built_in(chat_template),
    )
    with display.step_bar("plan-precision") as on_step:
        result = find_plan(
            source,
            measured.expanduser(),
            budget,
            output.expanduser(),
            data,
            samples,
            seed,
            scales,
            front,
            on_step,
        )
    if as_json:
        display.print_json(result.to_dict())
        return
    display.out.print(front_table(result))
    named = f"{checkpoint} {_checkpoint_options(adapter, chat_template)}--precision {output}"
    say(f"Wrote {output}. Next: dsvl-export export {named} --output BUNDLE")
