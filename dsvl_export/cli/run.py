"""The command ``run``, which answers one question with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    Adapter,
    Backend,
    BundleFolder,
    Capacity,
    Choices,
    Device,
    Drafts,
    Images,
    Json,
    JsonSchema,
    MaxNewTokens,
    Penalty,
    Precision,
    Regex,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    TrustEngine,
    Verify,
    response_format,
)

if TYPE_CHECKING:
    from runtimes.pipeline import Pipeline


def open_pipeline(
    folder: Path,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    device: str | None,
    capacity: int | None,
    verify: bool,
    trust_engine: bool,
    adapter: str | None = None,
) -> Pipeline:
    """Open a bundle to run it, and warn if the machine has too little free memory."""
    from runtimes.backends.engines.trust import trust_engines
    from runtimes.bundle.bundle import Bundle
    from runtimes.pipeline import Pipeline

    bundle = Bundle.open(folder)
    if trust_engine:
        trust_engines(bundle)
    backend, precision = bundle.select(backend, precision, adapter)
    remedy = "use a smaller precision or --capacity"
    warn_of_memory(bundle, backend, precision, device, capacity, remedy)
    return Pipeline.open(
        bundle, backend, precision, threads=threads, device=device, capacity=capacity, verify=verify,
        adapter=adapter,
    )  # fmt: skip


@command("run")
def run(
    bundle: BundleFolder,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The question. <image_placeholder> marks the position of an image; without it, images come"
            " first.",
        ),
    ],
    image: Images = None,
    backend: Backend = None,
    precision: Precision = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choices: Choices = None,
    drafts: Drafts = True,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Answer a question about images; the answer streams to stdout.

    Example: dsvl-export run tiny-bundle --image photo.png --prompt "What number is in the picture?"
    """
    from dsvl_export.cli import display
    from dsvl_export.cli.terminal import answer_text
    from runtimes.generation.answer import Answer
    from runtimes.generation.sampling import GenerationOptions

    options = GenerationOptions(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ()), drafts,
        response_format=response_format(json_schema, regex, choices),
    )  # fmt: skip
    pipeline = open_pipeline(
        bundle, backend, precision, threads, device, capacity, verify, trust_engine, adapter
    )
    answer = Answer()
    for piece, answer in pipeline.stream_chat(prompt, image or [], options):  # noqa: B007
        if not as_json:
            print(answer_text(piece), end="", flush=True)
    if as_json:
        display.print_json({**vars(answer), "tokens_per_second": answer.tokens_per_second})
        return
    print()
    display.err.print(
        f"[dim]{len(answer.tokens)} tokens ({answer.finish_reason}), first after"
        f" {answer.first_token_seconds:.2f} s, then {answer.tokens_per_second:.1f} per second[/]"
    )
