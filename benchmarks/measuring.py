"""Work in processes of their own, so that each one's peak memory is its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any


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


def climb(bundle: Path, backend: str, precision: str) -> dict[str, Any]:
    """The ladder."""
    from dsvl_export.ladder import parity

    result = parity(bundle, backend, precision)
    errors = {rung.name: rung.errors.relative_rms for rung in result.rungs if rung.errors}
    failed = [str(rung) for rung in result.rungs if rung.state == "failed"]
    return {"verdict": result.verdict, "by": str(result.execution), "errors": errors, "failed": failed}


def _report(sender: Any, work: Any, arguments: Any) -> None:
    started = time.perf_counter()
    result = work(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send({"result": result, "seconds": time.perf_counter() - started, "peak": peak})
