"""Debug builds of ONNX files: the same program with its taps as further outputs. Needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from onnx import helper

from dsvl_export.onnx_graph.builder import TAPS, element_type, value_info
from runtimes.contracts import Contract
from runtimes.errors import UserError
from runtimes.files import parse_json


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """The same file with the contract's taps as further outputs."""
    model = onnx.load(str(artifact), load_external_data=False)
    try:
        values = parse_json({item.key: item.value for item in model.metadata_props}[TAPS], "the list of taps")
        sources = [values[spec.name] for spec in contract.taps]
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{artifact} does not say where its taps are; export it again.") from error
    for spec, source in zip(contract.taps, sources, strict=True):
        model.graph.node.append(
            helper.make_node(
                "Cast", [source], [spec.name], name=f"tap/{spec.name}", to=element_type(spec.dtype)
            )
        )
        model.graph.output.append(value_info(spec.name, spec.dtype, spec.shape))
    debug = folder / artifact.name
    debug.write_bytes(model.SerializeToString())
    for data in artifact.parent.glob(f"{artifact.name}.data"):
        try:
            (folder / data.name).hardlink_to(data.resolve())  # ONNX Runtime refuses symbolic links
        except OSError:  # another file system
            shutil.copyfile(data, folder / data.name)
    return debug
