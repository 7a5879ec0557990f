"""Debug builds of ONNX files: the same program with its taps as outputs. Needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from onnx import helper

from dsvl_export.compilers.onnx.builder import TAPS, element_type, value_info
from runtimes.bundle.contracts import Contract
from runtimes.bundle.files import parse_json
from runtimes.errors import UserError

MAX_COPIED_BYTES = 1 << 30  # bytes of weights


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """Write the file with the contract's taps as further outputs."""
    model = onnx.load(str(artifact), load_external_data=False)
    sources = tap_values(model, artifact, contract)
    for spec, source in zip(contract.taps, sources, strict=True):
        model.graph.node.append(
            helper.make_node(
                "Cast", [source], [spec.name], name=f"tap/{spec.name}", to=element_type(spec.dtype)
            )
        )
        model.graph.output.append(value_info(spec.name, spec.dtype, spec.shape))
    return write_build(model, artifact, folder)


def tap_values(model: onnx.ModelProto, artifact: Path, contract: Contract) -> list[str]:
    """Return the values of the graph that hold the contract's taps, in order.

    Raises:
        UserError: the file does not list its taps.
    """
    try:
        values = parse_json({item.key: item.value for item in model.metadata_props}[TAPS], "the list of taps")
        return [values[spec.name] for spec in contract.taps]
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{artifact} does not list its taps; export it again.") from error


def write_build(model: onnx.ModelProto, artifact: Path, folder: Path) -> Path:
    """Write a changed graph with links to the weights beside it.

    Raises:
        UserError: the weights cannot be linked and are too large to copy.
    """
    file = folder / artifact.name
    file.write_bytes(model.SerializeToString())
    for data in artifact.parent.glob("*.data"):  # a prefill graph also reads the first graph's
        try:
            (folder / data.name).hardlink_to(data)  # ONNX Runtime refuses symbolic links
        except FileExistsError:  # linked for the other graph
            continue
        except OSError as error:  # another file system
            if data.stat().st_size > MAX_COPIED_BYTES:
                raise UserError(
                    f"{data} cannot be linked into {folder} ({error.strerror}), and is too large to copy;"
                    " make the bundle's folder writable."
                ) from error
            shutil.copyfile(data, folder / data.name)
    return file
