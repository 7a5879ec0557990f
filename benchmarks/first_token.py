"""From an image file to the first token at a released variant's full shape, by stage, beside other runtimes.

    python benchmarks/first_token.py WORK vision_encoder=openvino:int8-bf16 decoder=onnxruntime:8da4w-g128
    python benchmarks/first_token.py WORK vision_encoder=openvino:int8-bf16 decoder=onnxruntime:8da4w-g128 \
        --size 7b --peers transformers

Weights are random, threads are 2, the prompt is a question about one image. Every turn measures the bundle
and each peer, in processes of their own. A peer is the sum of its stages: vision towers, and its decoder's
prefill of as many tokens; the image file is read and resized by our code for all of them, and the adaptor of
the peers is not counted. The stored prefix of the system prompt, which exports with goldens record, is
computed here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import peers
from measuring import CAPACITY, checkpoint_of, cost, measured, spread, timed

from reference.checkpoint.released import released_config

THREADS, REPEATS = 2, 3
QUESTION = "Describe the picture in a few words."
# Peer → the form of its vision towers, and of its decoder.
PEERS = {"openvino": ("openvino-bf16", "int4-128"), "transformers": ("eager-bf16", "bf16")}
STAGES = ("image file", "vision encoder", "adaptor", "prefill")


def export_mix(bundle: Path, checkpoint: Path, components: dict[str, str], scales: Path | None) -> list[str]:
    """Export what is not there yet; the backend and precision, or the mix."""
    from dsvl_export.exporter.export import export

    made = export(
        str(checkpoint), bundle, goldens=False, capacity=CAPACITY, components=components, scales=scales
    )
    return list(made.choices()[0])


def first_token(bundle: Path, choice: list[str], image: Path) -> dict[str, Any]:
    """Seconds of each stage, and from the file to the first token: as before, in parallel, with a prefix."""
    from runtimes.generation.sampling import GenerationOptions
    from runtimes.pipeline import Pipeline
    from runtimes.prefix import StoredPrefix, compute_states, prefix_tokens
    from runtimes.preprocess import preprocess

    pipeline = Pipeline.open(bundle, *choice, threads=THREADS, verify=False)
    chain, options = pipeline.chain, GenerationOptions(max_new_tokens=1, ignore_eos=True)
    tokens = np.array(prefix_tokens(chain.tokenizer), np.int64)
    states = compute_states(chain, tokens)
    prefix = StoredPrefix("", tokens, states, np.zeros(len(states))).cast(chain.decoder.contract)
    found = {}

    def ask() -> float:
        pipeline.reset()
        chain._images.clear()
        return float(pipeline.chat(QUESTION, [image], options).first_token_seconds)

    for name, parallel, stored in (
        ("one after the other", False, None), ("text while the image is encoded", True, None),
        ("stored prefix", False, prefix),
    ):  # fmt: skip
        chain.separate_devices, chain.prefix = parallel, stored
        ask()
        found[name] = min(ask() for _ in range(REPEATS))
    pixels = preprocess(image, chain.preprocessing)
    features = chain.encode_pixels(pixels[None])
    embeds = chain.embed_prompt(pipeline.format(QUESTION, 1), [image])
    cache = chain.decoder.new_cache(1, pipeline.capacity)

    def prefill() -> None:
        cache.reset()
        chain.prefill(embeds, cache)

    work = (
        lambda: preprocess(image, chain.preprocessing), lambda: chain.encode_pixels(pixels[None]),
        lambda: chain.adapt(features), prefill,
    )  # fmt: skip
    stages = {name: min(timed(one) for _ in range(REPEATS)) for name, one in zip(STAGES, work, strict=True)}
    return {"stages": stages, "first": found, "prompt": len(embeds), "prefix": len(tokens)}


def of_peer(peer: str, work: Path, size: str, prompt: int) -> dict[str, float]:
    """Seconds of the stages of a peer."""
    vision, form = PEERS[peer]
    towers = ("siglip", "sam") if size == "7b" else ("siglip",)
    seconds = [
        min(json.loads(peers.run("vision", work, tower, vision, REPEATS).splitlines()[-1]))
        for tower in towers
    ]
    decode = peers.decoder(peer, form, released_config(size).decoder, work, size)
    return {"vision encoder": sum(seconds), "prefill": decode(THREADS, prompt, prompt + 1, 1)["prefill"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("ours", nargs="+", metavar="COMPONENT=BACKEND:PRECISION")
    parser.add_argument("--size", choices=("1.3b", "7b"), default="1.3b")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--scales", type=Path, help="of 'calibrate'; else it is calibrated on bundled images")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    components = dict(item.split("=", 1) for item in given.ours)
    checkpoint = checkpoint_of(given.work, given.size, None, None, None)
    name = "+".join(components.values()).replace(":", "-")
    bundle = given.work / f"{given.size}-{name}"
    made = measured(export_mix, bundle, checkpoint, components, given.scales)
    print(f"exported in {cost(made)}", flush=True)
    image = given.work / "photo.jpg"
    if not image.exists():
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(image, quality=90)
    rows: dict[str, list[dict[str, float]]] = {"dsvl-export": [], **{peer: [] for peer in given.peers}}
    totals: dict[str, list[float]] = {}
    for _ in range(given.turns):
        ours = measured(first_token, bundle, made["result"], image)["result"]
        rows["dsvl-export"].append(ours["stages"])
        for kind, seconds in ours["first"].items():
            totals.setdefault(kind, []).append(seconds)
        file = {"image file": ours["stages"]["image file"]}
        for peer in given.peers:
            rows[peer].append({**file, **of_peer(peer, given.work, given.size, ours["prompt"])})
        print(
            json.dumps({name: each[-1] for name, each in rows.items()} | {"first": ours["first"]}), flush=True
        )
    print(f"\nprompt of {ours['prompt']} tokens, {ours['prefix']} of them in the stored prefix; seconds\n")
    print(f"| | {' | '.join(STAGES)} | first token |\n|---{'|---' * (len(STAGES) + 1)}|")
    for name, each in rows.items():
        cells = [spread([row[stage] for row in each]) if stage in each[0] else "" for stage in STAGES]
        print(f"| {name} | {' | '.join(cells)} | {spread([sum(row.values()) for row in each])} |")
    for kind, seconds in totals.items():
        print(f"| dsvl-export, {kind} | {' | '.join([''] * len(STAGES))} | {spread(seconds)} |")


if __name__ == "__main__":
    main()
