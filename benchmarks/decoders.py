"""The decoder at a released variant's full shape, in turns with other runtimes: tokens per second and ratios.

    python benchmarks/decoders.py WORK onnxruntime:8da4w-g128 executorch:8da4w
    python benchmarks/decoders.py WORK onnxruntime:8da4w-g128 --peers llama:q4_0 transformers:bf16

Weights are random. Every turn runs each of them once, in a process of its own and 2 threads: a prompt of 640
tokens, then 40 tokens from a context of 700 on. Ratios are taken within a turn, to the first peer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import peers
from measuring import (
    CONTEXT,
    PROMPT,
    TOKENS,
    checkpoint_of,
    cost,
    decoder_times,
    export_to,
    measured,
    rates,
    spread,
)

from reference.checkpoint.released import released_config

THREADS = 2
VISION_LAYERS = 2  # the decoder alone is measured


def ours(work: Path, size: str, given: str) -> Callable[[], dict[str, Any]]:
    """``BACKEND:PRECISION`` of this project, exported if need be."""
    backend, _, precision = given.partition(":")
    bundle = work / f"{size}-{backend}-{precision}"
    checkpoint = checkpoint_of(work, size, None, VISION_LAYERS, None)
    found = measured(export_to, bundle, checkpoint, backend, precision)
    print(f"{given}: {json.dumps(found['result'])}; exported in {cost(found)}", flush=True)

    def measure() -> dict[str, Any]:
        result: dict[str, Any] = measured(decoder_times, bundle, backend, precision, THREADS)["result"]
        return result

    return measure


def theirs(work: Path, size: str, given: str) -> Callable[[], dict[str, Any]]:
    """``PEER:FORM``."""
    peer, _, form = given.partition(":")
    measure = peers.decoder(peer, form, released_config(size).decoder, work, size)
    return lambda: measure(THREADS, PROMPT, CONTEXT, TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("ours", nargs="+", metavar="BACKEND:PRECISION")
    known = [f"{peer}:{form}" for peer, forms in peers.FORMS.items() for form in forms]
    parser.add_argument("--peers", nargs="+", default=["llama:q4_0"], choices=known, metavar="PEER:FORM")
    parser.add_argument("--size", choices=("1.3b", "7b"), default="1.3b")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runners = {name: theirs(given.work, given.size, name) for name in given.peers}
    runners |= {name: ours(given.work, given.size, name) for name in given.ours}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(given.turns):
        for name, run in runners.items():
            result = run()
            found[name].append(rates(result))
            opened = (
                f", opened in {result['open']:.1f} s, {result['loaded'] / 1e9:.2f} GB"
                if "open" in result
                else ""
            )
            print(
                "{}: prefill {:.0f}, decode {:.1f} tok/s{}".format(name, *found[name][-1], opened), flush=True
            )
    print(
        f"\n| | prefill tok/s | decode tok/s | prefill, to {given.peers[0]} | decode |\n|---|---|---|---|---|"
    )
    judge = found[given.peers[0]]
    for name, each in found.items():
        columns = [spread([row[column] for row in each]) for column in (0, 1)]
        columns += [
            spread([mine[c] / peer[c] for mine, peer in zip(each, judge, strict=True)]) for c in (0, 1)
        ]
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
