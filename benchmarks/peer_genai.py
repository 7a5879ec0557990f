"""onnxruntime-genai on a decoder of random weights; run by ``peers.py`` in an environment of its own.

The form is the block size of its 4-bit weights: ``int4-32`` or ``int4-128``. The model is written by its own
builder, which rounds activations to 8 bits (accuracy level 4).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_transformers
from peer_command import Feed, main


def make(form: str, shape: dict[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = Path(scratch) / "source"
        peer_transformers.make_checkpoint(shape, source)
        options = ["--extra_options", "int4_accuracy_level=4", f"int4_block_size={form.split('-')[1]}"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source),
                   "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", scratch, *options]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def load(form: str, folder: Path, threads: int) -> tuple[Feed, Callable[[], None]]:
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(
        f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}'
    )
    model = genai.Model(config)
    state: dict[str, Any] = {}

    def forget() -> None:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=1024, do_sample=False)
        state["generator"] = genai.Generator(model, options)

    def feed(ids: list[int]) -> None:
        state["generator"].append_tokens(ids)

    forget()
    return feed, forget


if __name__ == "__main__":
    main(make, load)
