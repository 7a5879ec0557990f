"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsvl_export.cli.completion import bundle_adapters, bundle_backends, bundle_precisions, values

if TYPE_CHECKING:
    from runtimes.structured.response_format import ResponseFormat

# Panels of the help.
GENERATION = "Generation"
RUNTIME = "Runtime"
CHECK = "Parity check"

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="'tiny' (bundled), a checkpoint folder, or a Hugging Face hub id.",
        metavar="CHECKPOINT",
        autocompletion=values("tiny"),
    ),
]
OptionalCheckpoint = Annotated[
    Optional[str],
    typer.Argument(
        help="'tiny' (bundled), a checkpoint folder, or a Hugging Face hub id. Default: that of --config.",
        metavar="CHECKPOINT",
        autocompletion=values("tiny"),
    ),
]
Adapters = Annotated[
    Optional[list[str]],
    typer.Option(
        "--adapter",
        metavar="FOLDER[=WEIGHT]",
        help="LoRA adapter in PEFT's layout to merge into the checkpoint's weights, repeatable. WEIGHT"
        " multiplies its change.",
    ),
]
Adapter = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAME",
        help="Switchable LoRA adapter of the bundle, with onnxruntime. Default: none.",
        autocompletion=bundle_adapters,
    ),
]
Components = Annotated[
    Optional[list[str]],
    typer.Option(
        "--component",
        metavar="COMPONENT=BACKEND:PRECISION",
        help="Backend and precision of one component (vision_encoder, adaptor or decoder), repeatable: the"
        " bundle becomes a mix. Components that are not named have --backend and --precision; without these,"
        " the adaptor is like the vision encoder.",
    ),
]
ChatTemplate = Annotated[
    Optional[str],
    typer.Option(
        "--chat-template",
        metavar="CHOICE",
        help="checkpoint: the checkpoint's own chat template, if it has one. built-in: the built-in prompt."
        " Default: checkpoint.",
        autocompletion=values("checkpoint", "built-in"),
    ),
]
BundleFolder = Annotated[
    Path,
    typer.Argument(
        help="Bundle folder, made by 'export', or the Hugging Face hub id of a bundle.", metavar="BUNDLE"
    ),
]
Backend = Annotated[
    Optional[str],
    typer.Option(
        help="Backend of the bundle, or mixed. Default: the first in the bundle.",
        autocompletion=bundle_backends(),
    ),
]
Precision = Annotated[
    Optional[str],
    typer.Option(
        help="Precision of the bundle, or name of a mix. Default: the first in the bundle.",
        autocompletion=bundle_precisions(),
    ),
]
Device = Annotated[
    Optional[str],
    typer.Option(
        help="cpu, cuda or tensorrt (with onnxruntime); cpu, gpu or npu (with openvino); gpu, ane"
        " (fixed-length functions only) or cpu (with coreml). cpu also runs the ONNX files of the TensorRT"
        " backends in ONNX Runtime. For a mix also COMPONENT=DEVICE,… for some components. Default: the"
        " backend's own.",
        rich_help_panel=RUNTIME,
        autocompletion=values("cpu", "cuda", "tensorrt", "gpu", "npu", "ane"),
    ),
]
Threads = Annotated[
    Optional[int],
    typer.Option(
        min=1, help="Number of CPU threads. Default: the backend's choice.", rich_help_panel=RUNTIME
    ),
]
Capacity = Annotated[
    Optional[int],
    typer.Option(
        min=1, help="Capacity of the KV cache, in tokens. Default: the bundle's.", rich_help_panel=RUNTIME
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per answer on stdout.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Check the SHA-256 of each file before it is loaded.",
        rich_help_panel=RUNTIME,
    ),
]
TrustEngine = Annotated[
    bool,
    typer.Option(
        "--trust-engine",
        help="Allow the bundle's TensorRT engines to run code of their own on this machine, now and later."
        " Only version-compatible engines contain code. Engines built on this machine are trusted already.",
        rich_help_panel=RUNTIME,
    ),
]
Images = Annotated[Optional[list[Path]], typer.Option("--image", "-i", help="Image file, repeatable.")]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Maximum length of the answer, in tokens.", rich_help_panel=GENERATION)
]
Temperature = Annotated[
    float,
    typer.Option(min=0, help="Sampling temperature; 0 selects greedy decoding.", rich_help_panel=GENERATION),
]
TopK = Annotated[
    int,
    typer.Option(
        min=0,
        help="Sample from the K most probable tokens; 0 samples from all.",
        rich_help_panel=GENERATION,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample from the smallest set of tokens whose probabilities sum to at least P.",
        rich_help_panel=GENERATION,
    ),
]
Penalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        help="Values above 1 make repeated tokens less probable.",
        rich_help_panel=GENERATION,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=GENERATION)]
Stop = Annotated[
    Optional[list[str]],
    typer.Option(help="String that ends the answer, repeatable.", rich_help_panel=GENERATION),
]
JsonSchema = Annotated[
    Optional[Path],
    typer.Option(help="File with a JSON Schema that the answer must follow.", rich_help_panel=GENERATION),
]
Regex = Annotated[
    Optional[str],
    typer.Option(
        help="Regular expression (Rust's syntax) that the whole answer must match.",
        rich_help_panel=GENERATION,
    ),
]
Choices = Annotated[
    Optional[list[str]],
    typer.Option(help="A text that the answer may be; repeat for others.", rich_help_panel=GENERATION),
]
Drafts = Annotated[
    bool,
    typer.Option(
        "--drafts/--no-drafts",
        help="Use prompt-lookup speculative decoding: faster, with the same answer.",
        rich_help_panel=GENERATION,
    ),
]
Tolerances = Annotated[
    Optional[Path],
    typer.Option(
        metavar="YAML",
        help="File with tolerances that override the shipped ones.",
        rich_help_panel=CHECK,
    ),
]
Task = Annotated[
    Optional[str],
    typer.Option(
        help="Questions for the task_accuracy stage, which compares the exact-match rate with fp32: a JSONL"
        " file, 'heldout' (the questions of the tiny model, and its default) or 'none'.",
        rich_help_panel=CHECK,
        autocompletion=values("heldout", "none"),
    ),
]
Taps = Annotated[
    bool,
    typer.Option(
        "--taps",
        help="Compare layer by layer even if every stage passes.",
        rich_help_panel=CHECK,
    ),
]
Ray = Annotated[
    Optional[str],
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to distribute the work to: auto, HOST:PORT or ray://HOST:PORT. Checkpoint, bundle"
        " and data must have the same paths on all machines. Default: this machine only.",
        autocompletion=values("auto"),
    ),
]


def component_values(texts: Optional[list[str]]) -> dict[str, str]:
    """Return the values of ``--component`` by component.

    Raises:
        UserError: one is malformed, or two are of the same component.
    """
    from runtimes.bundle.mixes import COMPONENTS
    from runtimes.errors import UserError

    chosen: dict[str, str] = {}
    for text in texts or ():
        name, equals, choice = text.partition("=")
        if name not in COMPONENTS or not (equals and choice):
            raise UserError(
                f"--component {text!r} is not COMPONENT=BACKEND:PRECISION; the components are"
                f" {', '.join(COMPONENTS)}."
            )
        if name in chosen:
            raise UserError(f"--component names the {name} twice; give one.")
        chosen[name] = choice
    return chosen


def response_format(
    json_schema: Path | None, regex: str | None, choices: list[str] | None
) -> ResponseFormat | None:
    """Return the response format of the options of a command; at most one may be given.

    Raises:
        UserError: there are two, or one is wrong.
    """
    from runtimes.errors import UserError
    from runtimes.structured.response_format import ResponseFormat

    if sum(value is not None for value in (json_schema, regex, choices or None)) > 1:
        raise UserError("Give one of --json-schema, --regex and --choices.")
    if json_schema:
        return ResponseFormat.json_schema(json_schema)
    if regex is not None:
        return ResponseFormat.regex(regex)
    return ResponseFormat.choices(choices) if choices else None
