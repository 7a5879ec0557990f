"""Commands that choose numbers: ``calibrate``, ``sensitivity`` and ``plan-precision``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from dsvl_export.cli.app import app
from dsvl_export.cli.options import Checkpoint, Json, Ray
from dsvl_export.terminal import say
from runtimes.errors import UserError
from runtimes.installation import install_command

Data = Annotated[
    str,
    typer.Option(
        help="A folder of images, a JSONL file with image(s) and prompt(s) on each line, or 'bundled':"
        " 128 questions about rendered pictures."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples to use at most, drawn with the seed.")]
Seed = Annotated[int, typer.Option(help="Seed of that draw.")]
Scales = Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="Scale table made by 'calibrate'.")]


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scales.json and its vectors.")],
    data: Data = "bundled",
    samples: Samples = 128,
    seed: Seed = 0,
    method: Annotated[
        str, typer.Option(help="How INT8 ranges are found: minmax, percentile or mse.")
    ] = "mse",
    percentile: Annotated[float, typer.Option(help="For that method, in percent.")] = 99.99,
    tune: Annotated[
        Optional[str],
        typer.Option(
            metavar="PRECISION",
            help="Precision or plan to tune for: smoothing (SmoothQuant, AWQ) and GPTQ serve its layers.",
        ),
    ] = None,
    smooth: Annotated[
        bool, typer.Option("--smooth/--no-smooth", help="With --tune: search smoothing.")
    ] = True,
    gptq: Annotated[
        bool, typer.Option("--gptq/--no-gptq", help="With --tune: round 4-bit weights by GPTQ.")
    ] = True,
    rows: Annotated[int, typer.Option(min=0, help="Rows kept of each activation, for --tune.")] = 512,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Only part I of N of the data, for several machines.")
    ] = "1/1",
    merge: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="FOLDER", help="Merge the statistics of these folders instead of running data."),
    ] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Find the scales of all activations and of the KV cache, once for every backend.

    The data runs through the whole fp32 chain on the CPU: images with prompts, then the model's own
    answers. An interrupted run goes on where it stopped when you run the same command again.

    Example: dsvl-export calibrate tiny --data my-images --output scales, then dsvl-export export tiny
    --precision int8 --scales scales --output bundle
    """
    from dsvl_export import display
    from dsvl_export.calibrating import CalibrationOptions
    from dsvl_export.calibrating import calibrate as run_calibrate
    from dsvl_export.cluster import ray_cluster
    from reference.checkpoint import open_checkpoint

    wanted = CalibrationOptions(
        data, samples, seed, _part(part), method, percentile, rows, tune, smooth, gptq
    )
    source = open_checkpoint(checkpoint)
    with ray_cluster(ray) as spread, display.step_bar("calibrate") as on_step:
        done = run_calibrate(source, output.expanduser(), wanted, merge or (), on_step, spread)
    for image in done.skipped:
        display.err.print(f"[yellow]Skipped, it cannot be read:[/] {escape(image)}")
    table = done.table
    if as_json:
        display.print_json(
            {
                "output": str(output),
                "samples": table.samples,
                "skipped": list(done.skipped),
                "layers": len(table.activations),
                "smoothed": sorted(table.smoothing),
                "tuned": {name: weight.precision for name, weight in table.tuned.items()},
            }
        )
        return
    say(f"Wrote {output}: scales of {len(table.activations)} layers from {table.samples} samples.")
    if tune:
        say(
            f"For {tune}: {len(table.smoothing)} places smoothed, {len(table.tuned)} weights rounded by GPTQ."
        )
    options = f"--precision {tune or 'int8'} --scales {output}"
    say(f"Next: dsvl-export export {checkpoint} {options} --output BUNDLE")


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"The part {text!r} must look like 1/4.")
    return int(index), int(count)


@app.command()
def sensitivity(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for sensitivity.json and a plot.")],
    data: Data = "bundled",
    samples: Samples = 32,
    seed: Seed = 0,
    candidate: Annotated[
        Optional[list[str]],
        typer.Option(help="Precision to try, repeatable. Default: int4-g128, int4-g32 and int8-weights."),
    ] = None,
    scales: Scales = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Measure what quantizing each layer alone does to the answers: KL divergence, and answers kept.

    What is done is kept; the same command goes on where it stopped.
    """
    from dsvl_export import display
    from dsvl_export.cluster import ray_cluster
    from dsvl_export.display_quantizing import sensitivity_table
    from dsvl_export.precision_search import sensitivity as run_sensitivity
    from reference.checkpoint import open_checkpoint

    source = open_checkpoint(checkpoint)
    with ray_cluster(ray) as spread, display.step_bar("sensitivity") as on_step:
        found, picture = run_sensitivity(
            source, output.expanduser(), data, samples, seed, candidate, scales, on_step, spread
        )
    if as_json:
        display.print_json(
            {"rows": [vars(row) for row in found.rows], "plot": str(picture) if picture else None}
        )
        return
    display.out.print(sensitivity_table(found))
    plot = "" if picture else f"; for a plot: {install_command('matplotlib')}"
    say(f"Wrote {output}{plot}.")
    say(f"Next: dsvl-export plan-precision {checkpoint} {output} --budget kl=0.02 --output plan.yaml")


@app.command("plan-precision")
def plan_precision(
    checkpoint: Checkpoint,
    measured: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where 'sensitivity' wrote.")],
    budget: Annotated[
        str,
        typer.Option(help="kl=0.02 (nats per token), accuracy=0.99 (answers kept) or bytes=900M (weights)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file for the plan.")],
    data: Data = "bundled",
    samples: Samples = 128,
    seed: Seed = 0,
    scales: Scales = None,
    front: Annotated[
        bool, typer.Option("--front/--no-front", help="Measure and draw the Pareto front.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Find the precision of every layer that keeps a budget, checked on data 'sensitivity' has not seen.

    The plan is taken wherever --precision is. The Pareto front is drawn beside it.

    Example: dsvl-export plan-precision tiny measured --budget accuracy=0.99 --output plan.yaml
    """
    from dsvl_export import display
    from dsvl_export.display_quantizing import front_table
    from dsvl_export.precision_search import find_plan
    from reference.checkpoint import open_checkpoint

    source = open_checkpoint(checkpoint)
    with display.step_bar("plan-precision") as on_step:
        found = find_plan(
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
        display.print_json(found.to_dict())
        return
    display.out.print(front_table(found))
    say(f"Wrote {output}. Next: dsvl-export export {checkpoint} --precision {output} --output BUNDLE")
