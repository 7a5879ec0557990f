"""ExecuTorch's program at the 1.3B's full shape and SAM at 1024 px, against llama.cpp and eager PyTorch.

    python benchmarks/executorch_programs.py decoder WORK   # 8da4w against llama.cpp's Q4_0, in turns
    python benchmarks/executorch_programs.py sam WORK       # fp32, fp16 and 8da8w against eager PyTorch
    python benchmarks/executorch_programs.py widths WORK    # both variants, reduced depth, with the ladder

Checkpoints have random weights (``make_checkpoint.py``). Everything runs in 2 threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import peers
from make_checkpoint import config_of, write
from measuring import climb, cost, measured

from reference.released import released_config

THREADS, CAPACITY = 2, 1024
PROMPT, CONTEXT, TOKENS, ROUNDS = 640, 700, 40, 5


def checkpoint_of(work: Path, size: str, layers: int | None, vision: int | None, words: int | None) -> Path:
    """A random checkpoint; None keeps the released size."""
    folder = work / f"{size}-{layers or 'all'}-{vision or 'all'}-{words or 'all'}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        write(config_of(size, layers, vision, words), partial)
        partial.rename(folder)
    return folder


def convert(checkpoint: Path, bundle: Path, precision: str, goldens: bool) -> dict[str, Any]:
    """Export; bytes of the program and how many pieces XNNPACK took."""
    from dsvl_export.exporting import export

    made = export(str(checkpoint), bundle, "executorch", [precision], goldens, capacity=CAPACITY)
    (item,) = {a.files: a for a in made.manifest.artifacts if a.precision == precision}.values()
    size = sum(made.manifest.files[file].bytes for file in item.files)
    return {"bytes": size, "partitions": item.tools["partitions"]}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def ours(bundle: Path, precision: str) -> dict[str, Any]:
    """Seconds of a prefill and of each decoded token; seconds and resident bytes of opening."""
    from runtimes.pipeline import Pipeline

    before, started = resident(), time.perf_counter()
    pipeline = Pipeline.open(bundle, "executorch", precision, threads=THREADS, verify=False)
    opened = time.perf_counter() - started
    decoder = pipeline.chain.decoder
    (_, _, width), dtype = decoder.contract.inputs[0].shape, decoder.contract.inputs[0].dtype
    random = np.random.default_rng(0)
    embeds = random.standard_normal((1, CONTEXT + TOKENS, int(width)), dtype=np.float32).astype(dtype)
    last = np.array([0])

    def feed(start: int, end: int) -> float:
        begun = time.perf_counter()
        decoder.decode(embeds[:, start:end], last + end - start - 1, cache)
        return time.perf_counter() - begun

    cache = decoder.new_cache(1, CAPACITY)
    feed(0, 8)
    cache.rewind(8)
    loaded = resident() - before
    prefill = feed(0, PROMPT)
    feed(PROMPT, CONTEXT)
    decode = [feed(index, index + 1) for index in range(CONTEXT, CONTEXT + TOKENS)]
    return {"prefill": prefill, "decode": decode, "open": opened, "loaded": loaded}


def rates(found: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second of the prefill and of decoding."""
    return PROMPT / found["prefill"], 1 / statistics.median(found["decode"])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def decoder(work: Path, precisions: list[str]) -> None:
    """The 1.3B's whole decoder: turns with llama.cpp, so that the machine's mood is the same for both."""
    checkpoint = checkpoint_of(work, "1.3b", None, 2, None)
    file = peers.llama_file(released_config("1.3b").decoder, work, "1.3b")
    for precision in precisions or ["8da4w"]:
        bundle = work / f"1.3b-{precision}"
        if not (bundle / "manifest.json").exists():
            found = measured(convert, checkpoint, bundle, precision, False)
            print(f"{precision}: {json.dumps(found['result'])}; exported in {cost(found)}", flush=True)
        prefill, decode = [], []
        for _ in range(ROUNDS):
            mine = measured(ours, bundle, precision)["result"]
            theirs = peers.llama(file, work, THREADS, PROMPT, CONTEXT, TOKENS)
            (p, d), (q, e) = rates(mine), rates(theirs)
            prefill.append(p / q)
            decode.append(d / e)
            print(
                f"{precision}: prefill {p:.1f}, decode {d:.1f} tok/s, opened in {mine['open']:.1f} s,"
                f" {mine['loaded'] / 1e9:.2f} GB resident; llama.cpp Q4_0: {q:.1f}, {e:.1f}",
                flush=True,
            )
        print(f"Ratio to llama.cpp: prefill {spread(prefill)}, decode {spread(decode)}", flush=True)


def images(bundle: Path, precision: str, repeats: int) -> list[float]:
    """Seconds of the vision encoder in ExecuTorch."""
    from runtimes.pipeline import Pipeline

    encoder = Pipeline.open(
        bundle, "executorch", precision, threads=THREADS, verify=False
    ).chain.vision_encoder
    (spec,) = encoder.contract.inputs
    pixels = np.random.default_rng(0).random((1, *map(int, spec.shape[1:])), dtype=np.float32)
    return [_timed(lambda: encoder.run({spec.name: pixels.astype(spec.dtype)})) for _ in range(repeats)]


def eager(checkpoint: Path, repeats: int) -> list[float]:
    """Seconds of the same vision encoder in eager PyTorch, fp32."""
    import torch

    from reference.checkpoint import open_checkpoint

    torch.set_num_threads(THREADS)
    opened = open_checkpoint(str(checkpoint))
    encoder, vision = opened.model().vision_encoder, opened.config.vision
    size = (vision.sam or vision.siglip).image_size
    with torch.inference_mode():
        return [_timed(lambda: encoder(torch.rand(1, 3, size, size))) for _ in range(repeats)]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def sam(work: Path, precisions: list[str]) -> None:
    """SAM-B at 1024 px (beside one layer of SigLIP)."""
    checkpoint = work / "sam"
    if not checkpoint.exists():
        raw = config_of("7b", 1, 12, 1031)
        raw["vision_config"]["num_hidden_layers"] = 1
        write(raw, checkpoint)
    for precision in precisions or ["fp32", "fp16", "8da8w"]:
        bundle = work / f"sam-{precision}"
        if not (bundle / "manifest.json").exists():
            found = measured(convert, checkpoint, bundle, precision, False)
            print(f"{precision}: {json.dumps(found['result'])}; exported in {cost(found)}", flush=True)
        ratios = []
        for _ in range(3):
            peer, mine = measured(eager, checkpoint, 2), measured(images, bundle, precision, 2)
            seconds = [min(found["result"]) for found in (mine, peer)]
            ratios.append(seconds[0] / seconds[1])
            print(
                f"SAM {precision}: {seconds[0]:.2f} s, peak {mine['peak'] / 1e9:.1f} GB;"
                f" eager fp32 {seconds[1]:.2f} s, peak {peer['peak'] / 1e9:.1f} GB",
                flush=True,
            )
        print(f"Ratio to eager fp32: {spread(ratios)}", flush=True)


def widths(work: Path, precisions: list[str]) -> None:
    """Full width, one decoder layer, two vision layers."""
    for size in ("1.3b", "7b"):
        checkpoint = checkpoint_of(work, size, 1, 2, 1031)
        for precision in precisions or ["fp32", "fp16", "8da8w", "8da4w"]:
            bundle = work / f"{size}-widths"
            found = measured(convert, checkpoint, bundle, precision, True)
            print(f"{size} {precision}: {json.dumps(found['result'])}; {cost(found)}", flush=True)
            proof = measured(climb, bundle, "executorch", precision)
            print(f"Ladder: {json.dumps(proof['result'])} in {cost(proof)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"decoder": decoder, "sam": sam, "widths": widths}
    parser.add_argument("what", choices=commands)
    parser.add_argument("work", type=Path)
    parser.add_argument("precisions", nargs="*", help="default: those above")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    commands[given.what](given.work, given.precisions)


if __name__ == "__main__":
    main()
