"""Write a checkpoint of the released widths with random weights, in transformers' layout.

    python benchmarks/make_checkpoint.py 1.3b FOLDER [--layers 2] [--vision-layers 2] [--vocabulary 1031]

Tensors go to disk one by one, in half precision and shards of 2 GB, so memory stays small. Weights are
normal, scaled by the inputs of each layer, norms near one. The tokenizer is tiny's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from reference.checkpoint.checkpoint import parameter_shapes
from reference.checkpoint.config_file import parse_config
from reference.checkpoint.layouts import parameter_sources
from reference.checkpoint.released import RELEASED_CONFIGS, released_config
from reference.model.config import CLIP_MEAN, CLIP_STD, HALF_RGB
from reference.tiny import TINY

SHARD = 2 << 30
IMAGE_TOKEN = "<image_placeholder>"


def config_of(
    size: str, layers: int | None, vision_layers: int | None, vocabulary: int | None
) -> dict[str, Any]:
    """``config.json`` in transformers' layout; None keeps the released size."""
    decoder, siglip = released_config(size).decoder, released_config(size).vision.siglip
    vocabulary_of_tiny = json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]
    image_token = next(item["id"] for item in vocabulary_of_tiny if item["content"] == IMAGE_TOKEN)
    raw: dict[str, Any] = {
        "model_type": "deepseek_vl_hybrid" if size == "7b" else "deepseek_vl",
        "image_token_id": image_token,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            **RELEASED_CONFIGS[size]["language_config"],
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_width,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": layers or decoder.layers,
            "vocab_size": vocabulary or decoder.vocab_size,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16,
            "hidden_size": siglip.width, "intermediate_size": siglip.mlp_width,
            "num_hidden_layers": vision_layers or siglip.layers, "num_attention_heads": siglip.heads,
        },
    }  # fmt: skip
    if size == "7b":
        depth = vision_layers or 12
        raw["high_res_vision_config"] = {
            "model_type": "sam_vision_model", "num_hidden_layers": depth,
            "global_attn_indexes": sorted({min(layer, depth - 1) for layer in (2, 5, 8, 11)}),
        }  # fmt: skip
    return raw


def write(raw: dict[str, Any], folder: Path, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config = parse_config(raw, "config.json")
    tensors = {
        name: source.shape
        for source in parameter_sources(config, parameter_shapes(config)).values()
        for name in source.names
    }
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        if shards[-1] and filled + size > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    random = np.random.default_rng(seed)
    where: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, folder / name, random)
        where |= dict.fromkeys(shard, name)
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, folder / file)
    side = raw["vision_config"]["image_size"]
    processor: dict[str, Any] = {
        "image_mean": HALF_RGB, "image_std": HALF_RGB, "min_size": 14, "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }  # fmt: skip
    if "high_res_vision_config" in raw:
        processor |= {
            "high_res_size": {"height": 1024, "width": 1024},
            "high_res_image_mean": CLIP_MEAN, "high_res_image_std": CLIP_STD,
        }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return total


def _write_shard(shapes: dict[str, tuple[int, ...]], file: Path, random: np.random.Generator) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            handle.write(_values(name, shape, random).tobytes())


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        near_one = "norm" in name and name.endswith("weight")
        return (1 + 0.1 * noise if near_one else 0.02 * noise).astype(np.float16)
    inputs = int(np.prod(shape[1:]))
    noise *= 0.02 if "embed" in name or "rel_pos" in name else inputs**-0.5
    return noise.astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=("1.3b", "7b"))
    parser.add_argument("folder", type=Path)
    for name in ("--layers", "--vision-layers", "--vocabulary"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already; give a new folder")
    raw = config_of(given.size, given.layers, given.vision_layers, given.vocabulary)
    print(f"{write(raw, given.folder) / 1e9:.2f} GB in {given.folder}")


if __name__ == "__main__":
    main()
