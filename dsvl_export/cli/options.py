"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Checkpoint = Annotated[
    str, typer.Argument(help="'tiny' (bundled), a checkpoint folder, or a hub id.", metavar="CHECKPOINT")
]
BundleFolder = Annotated[Path, typer.Argument(help="Bundle folder, made by 'export'.", metavar="BUNDLE")]
Backend = Annotated[Optional[str], typer.Option(help="Backend of the bundle; default: its first.")]
Precision = Annotated[Optional[str], typer.Option(help="Precision of the bundle; default: its first.")]
Device = Annotated[
    Optional[str],
    typer.Option(
        help="cpu, cuda, or tensorrt (ONNX Runtime's); default: the backend's own. cpu runs the ONNX files of"
        " TensorRT's backends in ONNX Runtime. Of coreml: gpu, ane (the functions of fixed lengths) or cpu."
    ),
]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: the backend's choice.")]
Capacity = Annotated[
    Optional[int], typer.Option(min=1, help="Tokens that the KV cache holds; default: the bundle's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per answer on stdout.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check the SHA-256 of what is loaded.")]
TrustEngine = Annotated[
    bool,
    typer.Option(
        "--trust-engine",
        help="From now on, let the bundle's TensorRT engines run code of their own on this machine, as those"
        " that were built here may. Only version-compatible engines bring any.",
    ),
]
Images = Annotated[
    Optional[list[Path]], typer.Option("--image", "-i", help="Image file; repeat for several.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set with this probability.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Stop = Annotated[Optional[list[str]], typer.Option(help="String that ends the answer; repeatable.")]
Drafts = Annotated[
    bool,
    typer.Option(
        "--drafts/--no-drafts",
        help="Guess tokens that repeat earlier text and judge several in one call: faster, the same answer.",
    ),
]
Tolerances = Annotated[
    Optional[Path],
    typer.Option(metavar="YAML", help="Bounds that override the shipped ones (ladder/tolerances.yaml)."),
]
Task = Annotated[
    Optional[str],
    typer.Option(
        help="Questions whose exact match is held against fp32's: a JSONL file, 'heldout' (the tiny model's,"
        " its default) or 'none'."
    ),
]
Taps = Annotated[
    bool, typer.Option("--taps", help="Locate drift layer by layer even where every stage passes.")
]
Ray = Annotated[
    Optional[str],
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to spread the work over: auto, HOST:PORT or ray://HOST:PORT. Checkpoint, bundle and"
        " data must have the same paths on all machines. Default: this machine alone.",
    ),
]
