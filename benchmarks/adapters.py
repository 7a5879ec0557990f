"""What switchable LoRA adapters cost: prefill and decode without one, and with one, at a released width.

    python benchmarks/adapters.py WORK fp32 int4 8da4w-g128 [--layers 4] [--rank 16] [--turns 4]

Weights are random; the decoder has the given layers and a small vocabulary, so that the shares of the linear
layers, and with them of the adapter, are at least those of the whole model. Four decoders run the same tokens
in turns, call by call: of a bundle without the option, of a bundle with it and no adapter, of the graph for
adapters at rank 0 (what one graph for everything would cost), and with an adapter on all seven linear layers.
Times are CPU seconds of one thread, which other processes disturb less than seconds of the clock. Every turn
is a process of its own that opens the four in another order, since the place in memory matters, too. Ratios
are taken within a turn; the table has medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
from measuring import CAPACITY, checkpoint_of, cost, made_once, measured, resident

from reference.checkpoint.released import released_config

PROMPT, TOKENS, VOCABULARY = 512, 30, 1031
NAME = "measured"
KINDS = PLAIN, WITHOUT, RANK_0, WITH = (
    "plain bundle", "switchable, no adapter", "graph for adapters, rank 0", "adapter",
)  # fmt: skip


def write_adapter(size: str, layers: int, rank: int, folder: Path) -> None:
    """An adapter on all linear layers, in PEFT's layout."""
    config, random = released_config(size).decoder, np.random.default_rng(0)
    width, hidden = config.width, config.mlp_width
    shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    tensors = {}
    for layer in range(layers):
        for module, (inputs, outputs) in shapes.items():
            name = f"base_model.model.model.language_model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = (
                random.standard_normal((rank, inputs), np.float32) * inputs**-0.5
            )
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((outputs, rank), np.float32) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def export_one(bundle: Path, checkpoint: Path, precision: str, adapter: Path | None) -> int:
    """Export what is not there yet; bytes of the decoder's files."""
    from dsvl_export.exporter.export import export

    named = [f"{NAME}={adapter}"] if adapter else []
    made = export(
        checkpoint,
        bundle,
        precisions=[precision],
        goldens=False,
        capacity=CAPACITY,
        switchable_adapters=named,
    )
    (item,) = (a for a in made.manifest.artifacts if (a.component, a.precision) == ("decoder", precision))
    return sum(made.manifest.files[file].bytes for file in item.files)


def times(plain: Path, switchable: Path, precision: str, turn: int) -> dict[str, Any]:
    """CPU seconds of each decoder by kind of call, whether its logits are those of the plain bundle, and
    the bytes that its sessions took."""
    from runtimes.backends.onnxruntime import open_adaptable_decoder
    from runtimes.bundle.bundle import Bundle
    from runtimes.decoders import Decoders
    from runtimes.session import SessionOptions

    options, bundle = SessionOptions(threads=1), Bundle.open(switchable)
    file = bundle.path(bundle.artifact("decoder", "onnxruntime", precision).files[0])
    contract = bundle.manifest.contracts[precision]["decoder"]

    def opened(name: str) -> Any:
        if name == RANK_0:
            return open_adaptable_decoder(file, contract, options)
        source = Bundle.open(plain) if name == PLAIN else bundle
        ours = Decoders(source, "onnxruntime", precision, options, verify=False)
        return ours.open(NAME if name == WITH else None)

    decoders, memory = {}, {}
    for name in [*KINDS[turn % len(KINDS) :], *KINDS[: turn % len(KINDS)]]:
        before = resident()
        decoders[name] = opened(name)
        memory[name] = resident() - before
    spec = contract.inputs[0]
    embeds = np.random.default_rng(0).standard_normal((1, PROMPT + TOKENS, int(spec.shape[2])), np.float32)
    embeds = embeds.astype(spec.dtype)
    caches = {name: decoder.new_cache(1, CAPACITY) for name, decoder in decoders.items()}
    logits: dict[str, list[np.ndarray]] = {name: [] for name in decoders}

    def call(name: str, start: int, stop: int) -> float:
        begun = time.thread_time()
        out = decoders[name].decode(embeds[:, start:stop], np.array([stop - start - 1]), caches[name])
        spent = time.thread_time() - begun
        logits[name].append(out)
        return spent

    for name, cache in caches.items():  # warms up
        for start, stop in ((0, 64), (64, 65)):
            call(name, start, stop)
        cache.reset()
        logits[name].clear()
    prefill = {name: call(name, 0, PROMPT) for name in decoders}
    decode: dict[str, list[float]] = {name: [] for name in decoders}
    for token in range(PROMPT, PROMPT + TOKENS):
        for name in decoders:
            decode[name].append(call(name, token, token + 1))
    steps = {name: statistics.median(seconds) for name, seconds in decode.items()}
    equal = {name: np.array_equal(logits[name], logits[PLAIN]) for name in decoders}
    return {"prefill": prefill, "decode": steps, "equal": equal, "memory": memory}


def report(precision: str, results: list[dict[str, Any]]) -> None:
    for name in KINDS:
        row = [precision, name]
        for kind in ("prefill", "decode"):
            seconds = [result[kind][name] for result in results]
            ratios = [100 * result[kind][name] / result[kind][PLAIN] - 100 for result in results]
            row.append(f"{statistics.median(seconds) * 1e3:.1f} ms")
            spread = f"{statistics.median(ratios):+.1f} % ({min(ratios):+.1f} to {max(ratios):+.1f})"
            row.append("" if name == PLAIN else spread)
        equal = all(result["equal"][name] for result in results)
        row.append("equal" if equal else "differ")
        row.append(f"{statistics.median(result['memory'][name] for result in results) / 1e9:.2f} GB")
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("precisions", nargs="+", metavar="PRECISION")
    parser.add_argument("--size", choices=("1.3b", "7b"), default="1.3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(given.work, given.size, given.layers, 1, VOCABULARY)
    adapter = given.work / f"adapter-{given.size}-{given.layers}-{given.rank}"
    made_once(adapter, partial(write_adapter, given.size, given.layers, given.rank))
    print("| | | prefill | | decode | | logits | memory |\n|---|---|---|---|---|---|---|---|", flush=True)
    for precision in given.precisions:
        bundles = []
        for kind, choice in (("plain", None), ("switchable", adapter)):
            bundles.append(given.work / f"{given.size}-{given.layers}-{precision}-{kind}")
            made = measured(export_one, bundles[-1], checkpoint, precision, choice)
            print(
                f"{bundles[-1].name}: decoder {made['result'] / 1e6:.1f} MB, exported in {cost(made)}",
                file=sys.stderr,
            )
        turns = range(given.turns)
        report(precision, [measured(times, *bundles, precision, turn)["result"] for turn in turns])


if __name__ == "__main__":
    main()
