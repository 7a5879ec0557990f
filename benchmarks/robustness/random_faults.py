"""Random faults in the files of a bundle, as mistakes of a converter or an editor would look.

A fault is drawn from a seed, planted, and given its new hash: nothing but the numbers tells it from a sound
file. ``plant`` says what it did.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from runtimes.bundle import MANIFEST, FileEntry
from runtimes.files import read_json, sha256_of_file, write_json

COMPONENTS = {"decoder": 5, "vision_encoder": 4, "adaptor": 1}  # and how often each is chosen
TOKEN_TABLE, TOKENIZER = "token_embedding/token_embedding.safetensors", "tokenizer/tokenizer.json"
SHARED_SHARE = 0.15  # of all faults
ModelEdit = Callable[[onnx.ModelProto, Random], "str | None"]


def plant(bundle: Path, backend: str, precision: str, seed: int) -> tuple[str, list[Path]]:
    """Plant one fault into a bundle of ONNX files.

    Returns:
        What was done, and the files that were changed besides the manifest.
    """
    random = Random(seed)
    if random.random() < SHARED_SHARE:
        kind = random.choice([_token_table, _tokenizer, _manifest])
        return kind(bundle, random)
    (component,) = random.choices(list(COMPONENTS), list(COMPONENTS.values()))
    path = f"{backend}/{precision}/{component}/{component}.onnx"
    model = onnx.load(str(bundle / path))
    done = None
    while done is None:
        done = random.choice(MODEL_EDITS)(model, random)
    onnx.save(model, str(bundle / path))
    rehash(bundle, path)
    return f"{component}: {done}", [bundle / path]


def rehash(bundle: Path, path: str) -> None:
    """Give a changed file its new hash in the manifest."""
    raw = read_json(bundle / MANIFEST)
    file = bundle / path
    raw["files"][path] = vars(FileEntry(file.stat().st_size, sha256_of_file(file)))
    write_json(bundle / MANIFEST, raw)


def change_values(values: np.ndarray, random: Random) -> tuple[str, np.ndarray] | None:
    """Another array of the same shape and dtype; None where the change drawn is none."""
    axis = random.randrange(max(values.ndim, 1))
    rows = values.shape[axis] if values.ndim else 1
    first, second = random.randrange(rows), random.randrange(rows)
    if values.dtype.kind not in "iu":
        values = values.astype(np.float32)
    changed = values.copy()
    moved = np.moveaxis(changed, axis, 0) if values.ndim else changed.reshape(1)
    kind = random.choice(
        ["zeroed", "swapped", "scaled", "one scaled", "rolled", "negated", "all zero", "noise"]
    )
    factor = random.choice([0.5, 0.9, 1.05, 1.3, 2.0])
    if kind == "zeroed":
        moved[first] = 0
    elif kind == "swapped":
        moved[[first, second]] = moved[[second, first]]
    elif kind == "rolled":
        moved[...] = np.roll(moved, 1, axis=0)
    elif kind == "all zero":
        moved[...] = 0
    elif values.dtype.kind in "iu":
        moved[first] = moved[second]
        kind = "copied"
    elif kind == "scaled":
        moved *= factor
    elif kind == "one scaled":
        moved[first] *= factor
    elif kind == "negated":
        moved[first] *= -1
    else:
        spread = np.random.default_rng(random.randrange(1 << 30)).standard_normal(moved.shape)
        moved += 0.05 * values.std() * spread.astype(np.float32)
    if np.array_equal(changed, values):
        return None
    places = {"zeroed": first, "swapped": (first, second), "scaled": factor, "one scaled": (first, factor)}
    return f"{kind} {places.get(kind, '')} on axis {axis}", changed


def _tensor(model: onnx.ModelProto, random: Random) -> str | None:
    tensor = random.choice(model.graph.initializer)
    small = tensor.data_type == TensorProto.INT64
    if small or tensor.data_type in (TensorProto.INT4, TensorProto.FLOAT8E4M3FN):
        return None
    values = numpy_helper.to_array(tensor)
    changed = change_values(values, random)
    if changed is None:
        return None
    what, array = changed
    array = np.ascontiguousarray(array.astype(values.dtype))
    if np.array_equal(array, values):
        return None
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"{tensor.name} {what}"


def _rope_rows(model: onnx.ModelProto, random: Random) -> str | None:
    tables = [item for item in model.graph.initializer if item.name in ("cos", "sin")]
    if not tables:
        return None
    tensor = random.choice(tables)
    values = numpy_helper.to_array(tensor).copy()
    first = random.randrange(len(values))
    values[first : first + random.choice([1, 16])] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"{tensor.name} zeroed from row {first} on"


def _epsilons(model: onnx.ModelProto, random: Random) -> str | None:
    found = [
        (node, field) for node in model.graph.node for field in node.attribute if field.name == "epsilon"
    ]
    if not found:
        return None
    value = random.choice([1e-3, 1e-2, 0.0])
    chosen = found if random.random() < 0.5 else [random.choice(found)]
    for _, field in chosen:
        field.f = value
    return f"{len(chosen)} epsilons {value} ({chosen[0][0].name})"


def _attention(model: onnx.ModelProto, random: Random) -> str | None:
    nodes = [item for item in model.graph.node if "Attention" in item.op_type]
    if not nodes:
        return None
    node = random.choice(nodes)
    cached = node.op_type == "GroupQueryAttention"
    names = (
        [("local_window_size", random.choice([16, 100, 400])), ("rotary_interleaved", 1)] if cached else []
    )
    name, value = random.choice([*names, ("scale", random.choice([0.1, 0.15, 0.25, 0.3]))])
    kept = [field for field in node.attribute if field.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return f"{node.name}: {name} {value}"


def _operator(model: onnx.ModelProto, random: Random) -> str | None:
    others = {"Add": "Sub", "Mul": "Div", "Sub": "Add", "Div": "Mul", "Sigmoid": "Tanh", "Gelu": "Relu"}
    nodes = [item for item in model.graph.node if item.op_type in others]
    if not nodes:
        return None
    node = random.choice(nodes)
    before, node.op_type = node.op_type, others[node.op_type]
    if node.op_type == "Relu":
        del node.attribute[:]
    return f"{node.name}: {node.op_type} for {before}"


def _wiring(model: onnx.ModelProto, random: Random) -> str | None:
    """A residual of another layer, or two nodes that read each other's input."""
    nodes = [item for item in model.graph.node if item.op_type in ("Add", "MatMul", "Mul")]
    one, other = random.choice(nodes), random.choice(nodes)
    index = random.randrange(2)
    if one.name == other.name or one.op_type != other.op_type or one.input[index] == other.input[index]:
        return None
    shapes = {item.name: list(item.dims) for item in model.graph.initializer}
    if shapes.get(one.input[index]) != shapes.get(other.input[index]):
        return None
    one.input[index], other.input[index] = other.input[index], one.input[index]
    return f"{one.name} and {other.name} read each other's input {index}"


MODEL_EDITS: list[ModelEdit] = [
    _tensor, _tensor, _tensor, _tensor, _tensor, _rope_rows, _epsilons, _attention, _operator, _wiring,
]  # fmt: skip


def _token_table(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    file = bundle / TOKEN_TABLE
    (table,) = load_file(file).values()
    changed = None
    while changed is None:
        changed = change_values(table, random)
    save_file({"token_embedding": np.ascontiguousarray(changed[1].astype(table.dtype))}, file)
    rehash(bundle, TOKEN_TABLE)
    return f"token table: {changed[0]}", [file]


def _tokenizer(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    file = bundle / TOKENIZER
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = random.choice(["swapped", "normalizer", "decoder"])
    if kind == "swapped":
        vocabulary = raw["model"]["vocab"]
        one, other = random.sample(sorted(vocabulary), 2)
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        kind = f"{one!r} and {other!r} swapped"
    elif kind == "normalizer":
        raw["normalizer"] = {"type": "Lowercase"}
    else:
        raw["decoder"] = {"type": "Fuse"}
    file.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    rehash(bundle, TOKENIZER)
    return f"tokenizer: {kind}", [file]


def _manifest(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    raw = read_json(bundle / MANIFEST)
    changes: list[tuple[str, str, Any]] = [
        ("preprocessing", "mean", [0.45, 0.5, 0.5]), ("preprocessing", "std", [0.3, 0.3, 0.3]),
        ("preprocessing", "background", [0, 0, 0]), ("preprocessing", "rescale_factor", 0.005),
        ("prompt", "system_prompt", "Answer in French."), ("prompt", "eos_ids", [7]),
        ("prompt", "bos_id", 9),
    ]  # fmt: skip
    group, name, value = random.choice(changes)
    raw[group][name] = value
    write_json(bundle / MANIFEST, raw)
    return f"manifest: {group}.{name} {value}", []
