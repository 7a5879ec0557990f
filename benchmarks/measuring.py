"""What the benchmarks share: work in processes of their own, random checkpoints, timed components."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from make_checkpoint import config_of, write

CAPACITY = 1024
PROMPT, CONTEXT, TOKENS = 640, 700, 40


def measured(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run in a process of its own; its result with seconds and peak resident memory in bytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{work.__name__}{arguments} ended with {process.exitcode}") from None
    process.join()
    return found


def cost(found: dict[str, Any]) -> str:
    return f"{found['seconds']:.0f} s, peak {found['peak'] / 1e9:.1f} GB"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder, made beside its place if it is not there; what an interruption left goes first."""
    if not path.exists():
        half = path.with_name(f"{path.name}.partial")
        if half.is_dir():
            shutil.rmtree(half)
        make(half)
        half.rename(path)
    return path


def checkpoint_of(work: Path, size: str, layers: int | None, vision: int | None, words: int | None) -> Path:
    """A random checkpoint; None keeps the released size."""
    folder = work / f"{size}-{layers or 'all'}-{vision or 'all'}-{words or 'all'}"
    return made_once(folder, partial(write, config_of(size, layers, vision, words)))


def export_to(bundle: Path, checkpoint: Path, backend: str, precision: str, goldens: bool = False) -> Any:
    """Export what is not there yet; bytes by component, and the tools that the manifest names."""
    from dsvl_export.exporter.export import export

    made = export(str(checkpoint), bundle, backend, [precision], goldens, capacity=CAPACITY)
    items = [a for a in made.manifest.artifacts if (a.backend, a.precision) == (backend, precision)]
    sizes = {item.component: sum(made.manifest.files[file].bytes for file in item.files) for item in items}
    return {"bytes": sizes, "tools": items[0].tools}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def decoder_times(bundle: Path, backend: str, precision: str, threads: int) -> dict[str, Any]:
    """Seconds of a prefill and of each decoded token; seconds and resident bytes of opening."""
    from runtimes.pipeline import Pipeline

    before, started = resident(), time.perf_counter()
    pipeline = Pipeline.open(bundle, backend, precision, threads=threads, verify=False)
    opened = time.perf_counter() - started
    decoder = pipeline.chain.decoder
    (_, _, width), dtype = decoder.contract.inputs[0].shape, decoder.contract.inputs[0].dtype
    random = np.random.default_rng(0)
    embeds = random.standard_normal((1, CONTEXT + TOKENS, int(width)), dtype=np.float32).astype(dtype)
    last = np.array([0])

    def feed(start: int, end: int) -> float:
        return timed(lambda: decoder.decode(embeds[:, start:end], last + end - start - 1, cache))

    cache = decoder.new_cache(1, CAPACITY)
    feed(0, PROMPT)  # warms both up
    feed(PROMPT, PROMPT + 1)
    cache.reset()
    loaded = resident() - before
    prefill = feed(0, PROMPT)
    feed(PROMPT, CONTEXT)
    decode = [feed(index, index + 1) for index in range(CONTEXT, CONTEXT + TOKENS)]
    return {"prefill": prefill, "decode": decode, "open": opened, "loaded": loaded}


def rates(found: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second of the prefill and of decoding."""
    return PROMPT / found["prefill"], 1 / statistics.median(found["decode"])


def check_parity(bundle: Path, backend: str, precision: str) -> dict[str, Any]:
    """The parity check."""
    from dsvl_export.parity_check import parity

    result = parity(bundle, backend, precision)
    errors = {stage.name: stage.errors.relative_rms for stage in result.stages if stage.errors}
    failed = [str(stage) for stage in result.stages if stage.state == "failed"]
    return {"verdict": result.verdict, "by": str(result.execution), "errors": errors, "failed": failed}


def _report(sender: Any, work: Any, arguments: Any) -> None:
    started = time.perf_counter()
    result = work(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send({"result": result, "seconds": time.perf_counter() - started, "peak": peak})
