"""The command line of the peers' scripts; imports nothing that a peer's environment could lack.

python peer_<name>.py make FORM SHAPE.json OUTPUT
python peer_<name>.py time FORM OUTPUT --threads 2 --prompt 640 --context 700 --tokens 40
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Feed = Callable[[list[int]], None]


def measure(feed: Feed, forget: Callable[[], None], given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a prefill and of each decoded token.

    Args:
        feed: reads tokens behind those that it has read, and computes the logits of the last one.
        forget: empties the KV cache.
    """
    ids = [7 * index % 1000 for index in range(given.context)]

    def timed(tokens: list[int]) -> float:
        started = time.perf_counter()
        feed(tokens)
        return time.perf_counter() - started

    feed(ids[: given.prompt])  # warms both up
    feed(ids[given.prompt : given.prompt + 1])
    forget()
    prefill = timed(ids[: given.prompt])
    feed(ids[given.prompt :])
    return {"prefill": prefill, "decode": [timed([index]) for index in range(given.tokens)]}


def main(
    make: Callable[[str, dict[str, Any], Path], None],
    load: Callable[[str, Path, int], tuple[Feed, Callable[[], None]]],
) -> None:
    """Run a peer's script.

    Args:
        make: form, shape and where to write.
        load: form, what was written, and threads.
    """
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    making, timing = commands.add_parser("make"), commands.add_parser("time")
    for command in (making, timing):
        command.add_argument("form")
    making.add_argument("shape", type=Path)
    making.add_argument("output", type=Path)
    timing.add_argument("file", type=Path)
    for name in ("--threads", "--prompt", "--context", "--tokens"):
        timing.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    if given.command == "make":
        make(given.form, json.loads(given.shape.read_text()), given.output)
    else:
        print(json.dumps(measure(*load(given.form, given.file, given.threads), given)))
