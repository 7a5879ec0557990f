"""Faults of OpenVINO's IR: constants in the weights, and the types of operators."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.robustness.faults.values import change_values

DTYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "u8": np.uint8}
OTHERS = {"Add": "Subtract", "Subtract": "Add", "Multiply": "Divide", "Divide": "Multiply", "Swish": "Gelu"}
OPERATOR_SHARE = 0.15  # of the faults; the others change numbers


def plant(folder: Path, random: Random) -> tuple[str, list[Path]]:
    """Change the component in a folder."""
    (graph,) = folder.glob("*.xml")
    tree = ElementTree.parse(graph)
    layers = tree.getroot().findall("./layers/layer")
    if random.random() < OPERATOR_SHARE:
        layer = random.choice([item for item in layers if item.get("type") in OTHERS])
        before = str(layer.get("type"))
        layer.set("type", OTHERS[before])
        tree.write(graph)
        return f"{layer.get('name')}: {OTHERS[before]} for {before}", [graph]
    file = graph.with_suffix(".bin")
    constants = [
        (str(item.get("name")), data.attrib)
        for item in layers
        if item.get("type") == "Const"
        and (data := item.find("data")) is not None
        and data.get("element_type") in DTYPES
        and int(data.get("size", 0)) >= 64
    ]
    content = np.memmap(file, np.uint8, "r+")
    while True:
        name, place = random.choice(constants)
        start, size = int(place["offset"]), int(place["size"])
        values = content[start : start + size].view(DTYPES[place["element_type"]])
        shape = tuple(map(int, place["shape"].split(",")))
        changed = change_values(values.reshape(shape), random)
        if changed is not None:
            content[start : start + size] = changed[1].astype(values.dtype).reshape(-1).view(np.uint8)
            content.flush()
            return f"{name} {changed[0]}", [file]
