"""The vision towers at full size, one image, in turns with other runtimes: seconds and ratios.

    python benchmarks/encoders.py WORK siglip onnxruntime:fp32 onnxruntime:8da8w
    python benchmarks/encoders.py WORK sam onnxruntime:8da8w executorch:8da8w --peers openvino-bf16

Weights are random, threads are 2. SigLIP-L has 384 px, SAM-B 1024 px; the encoder with SAM also runs one
layer of SigLIP, which the peers do not. Ratios are taken within a turn: the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import peers
from make_checkpoint import config_of, write
from measuring import checkpoint_of, cost, export_to, made_once, measured, spread, timed

THREADS, REPEATS = 2, 3
PEERS = ("eager-fp32", "eager-bf16", "compile-fp32", "compile-bf16", "openvino-fp32", "openvino-bf16")


def checkpoint(work: Path, tower: str) -> Path:
    """One tower at full size with the smallest of everything else."""
    if tower == "siglip":
        return checkpoint_of(work, "1.3b", 1, 24, 1031)
    raw = config_of("7b", 1, 12, 1031)
    raw["vision_config"]["num_hidden_layers"] = 1
    return made_once(work / "sam", partial(write, raw))


def encode(bundle: Path, backend: str, precision: str) -> list[float]:
    """Seconds of the vision encoder."""
    from runtimes.pipeline import Pipeline

    opened = Pipeline.open(bundle, backend, precision, threads=THREADS, verify=False)
    encoder = opened.chain.vision_encoder
    (spec,) = encoder.contract.inputs
    pixels = np.random.default_rng(0).random((1, *map(int, spec.shape[1:])), dtype=np.float32)
    inputs = {spec.name: pixels.astype(spec.dtype)}
    encoder.run(inputs)
    return [timed(lambda: encoder.run(inputs)) for _ in range(REPEATS)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("tower", choices=("siglip", "sam"))
    parser.add_argument("ours", nargs="+", metavar="BACKEND:PRECISION")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bundles = {}
    for name in given.ours:
        backend, _, precision = name.partition(":")
        bundle = given.work / f"{given.tower}-{backend}-{precision}"
        bundles[name] = (bundle, backend, precision)
        found = measured(export_to, bundle, checkpoint(given.work, given.tower), backend, precision)
        print(f"{name}: {json.dumps(found['result'])}; exported in {cost(found)}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in (*given.peers, *given.ours)}
    for _ in range(given.turns):
        for name in seconds:
            if name in bundles:
                each = measured(encode, *bundles[name])["result"]
            else:
                each = json.loads(
                    peers.run("vision", given.work, given.tower, name, REPEATS).splitlines()[-1]
                )
            seconds[name].append(min(each))
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    print(f"\n| {given.tower} | seconds | {' | '.join(f'faster than {name}' for name in given.peers)} |")
    print("|---" * (2 + len(given.peers)) + "|")
    for name, mine in seconds.items():
        ratios = [
            spread([peer / own for peer, own in zip(seconds[other], mine, strict=True)])
            for other in given.peers
        ]
        print(f"| {name} | {spread(mine)} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
