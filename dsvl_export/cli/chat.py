"""The command ``chat``, which answers messages from the terminal with a bundle."""

from __future__ import annotations

from dsvl_export.cli.app import command
from dsvl_export.cli.options import (
    Adapter,
    Backend,
    BundleFolder,
    Capacity,
    Choices,
    Device,
    Drafts,
    Images,
    JsonLines,
    JsonSchema,
    MaxNewTokens,
    Precision,
    Regex,
    Seed,
    Temperature,
    Threads,
    TrustEngine,
    Verify,
    response_format,
)
from dsvl_export.cli.run import open_pipeline


@command("chat")
def chat(
    bundle: BundleFolder,
    image: Images = None,
    backend: Backend = None,
    precision: Precision = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choices: Choices = None,
    drafts: Drafts = True,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    trust_engine: TrustEngine = False,
    as_json: JsonLines = False,
) -> None:
    """Chat about images; each turn computes only what is new.

    In the chat, /image FILE adds an image to the next message, /reset starts a new conversation,
    and /quit (or Ctrl-D) ends the chat.
    """
    from dsvl_export.cli.conversation import converse
    from runtimes.generation.sampling import GenerationOptions

    options = GenerationOptions(
        max_new_tokens, temperature, seed=seed, drafts=drafts,
        response_format=response_format(json_schema, regex, choices),
    )  # fmt: skip
    pipeline = open_pipeline(
        bundle, backend, precision, threads, device, capacity, verify, trust_engine, adapter
    )
    converse(pipeline, image or [], options, as_json)
