"""The command ``extract``, which reads the fields of a JSON Schema from a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.options import (
    Backend,
    BundleFolder,
    Capacity,
    Device,
    Json,
    MaxNewTokens,
    Precision,
    Ray,
    Seed,
    Temperature,
    Threads,
)
from dsvl_export.cli.terminal import say

PROMPT = "Extract the fields from the picture as JSON."
FAILED = 1  # exit code if some images have no fields


@command("extract")
def extract(
    bundle: BundleFolder,
    schema: Annotated[Path, typer.Option(help="File with the JSON Schema of the fields.")],
    images: Annotated[Path, typer.Option(help="Folder of the images; subfolders count.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON Lines file: a line for each image.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question about each image.")] = PROMPT,
    backend: Backend = None,
    precision: Precision = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Extract the fields of a JSON Schema from every image of a folder.

    Each line of the output has an image and its data, which are valid under the schema, or the
    error of this image. If the run is interrupted, run the same command again: it resumes. The exit
    code is 1 if some images have an error.

    Example: dsvl-export extract my-bundle --schema invoice.json --images scans --output out.jsonl
    """
    from dsvl_export.cli import display
    from dsvl_export.cluster.ray_cluster import ray_cluster
    from dsvl_export.documents.extract import ExtractOptions
    from dsvl_export.documents.extract import extract as run_extract
    from runtimes.generation.sampling import GenerationOptions
    from runtimes.structured.response_format import ResponseFormat

    options = ExtractOptions(
        ResponseFormat.json_schema(schema), prompt,
        GenerationOptions(max_new_tokens, temperature, seed=seed),
        backend, precision, device, threads, capacity,
    )  # fmt: skip
    with ray_cluster(ray) as spread, display.step_bar("extract") as on_step:
        result = run_extract(bundle, images, output, options, on_step, spread)
    if as_json:
        display.print_json({"output": str(output), **vars(result)})
    else:
        resumed = f", {result.resumed} of them before" if result.resumed else ""
        failed = f"; {result.failed} have an error" if result.failed else ""
        say(f"Wrote {output}: {result.files} images{resumed}{failed}.")
    if result.failed:
        raise typer.Exit(FAILED)
