"""A package on disk: its manifest, its protobuf, its functions."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes.backends.mil.blob import WeightFile
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.installation import install_command

SUFFIX = ".mlpackage"
SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
# Our keys in a package's metadata.
TAPS = "dsvl_export.taps"  # function → tap → the variable that is it
CONTRACT = "dsvl_export.contract"  # of the component, as in the bundle's manifest
PREPROCESSING = "dsvl_export.preprocessing"  # of the model's images, likewise
# Functions beside MAIN and DECODE: of the vision encoder, and of the decoder.
IMAGE, EXTEND, PREFILL = "image", "extend", "prefill"
CHUNK = 256  # tokens that PREFILL takes, and the most that EXTEND takes
_PROTO = "_dsvl_export_coreml_proto"


def messages() -> Any:
    """The module of Core ML's protobuf messages.

    It is read from coremltools without importing coremltools itself, which would import torch.

    Raises:
        UserError: coremltools is not installed.
    """
    if _PROTO not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or found.origin is None:
            raise UserError(
                f"Reading Core ML packages needs coremltools; run: {install_command('coremltools')}."
            )
        package = ModuleType(_PROTO)
        package.__path__ = [str(Path(found.origin).parent / "proto")]
        sys.modules[_PROTO] = package
    return importlib.import_module(f"{_PROTO}.Model_pb2")


class Package:
    """A ``.mlpackage`` that holds an ML program.

    Raises:
        UserError: it is none, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / SPECIFICATION
        self.model = messages().Model()
        from google.protobuf.message import DecodeError  # comes with coremltools

        try:
            self.model.ParseFromString(file.read_bytes())
        except OSError as error:
            raise UserError(f"The package {folder} cannot be read: {error.strerror}.") from error
        except DecodeError as error:
            raise UserError(f"The model in {folder} is damaged.") from error
        if self.model.WhichOneof("Type") != "mlProgram":
            raise UserError(f"{folder} holds no ML program.")

    @cached_property
    def weights(self) -> WeightFile:
        return WeightFile(self.folder / WEIGHTS)

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.model.description.metadata.userDefined)

    @property
    def function_names(self) -> list[str]:
        return sorted(self.model.mlProgram.functions)

    def function(self, name: str) -> Any:
        """The protobuf of a function.

        Raises:
            UserError: there is none of that name.
        """
        functions = self.model.mlProgram.functions
        if name not in functions:
            raise UserError(
                f"{self.folder} has no function {name!r}; there are {', '.join(self.function_names)}."
            )
        return functions[name]

    def values(self) -> int:
        """How many numbers all weights are; what functions share counts once."""
        found: dict[Any, int] = {}
        for name in self.function_names:
            proto = self.function(name)
            for operation in proto.block_specializations[proto.opset].operations:
                if operation.type == "const" or operation.type.startswith("constexpr_"):
                    for output in operation.outputs:
                        sizes = [dim.constant.size for dim in output.type.tensorType.dimensions]
                        found[output.name] = prod(sizes)
        return sum(found.values())

    def capacity(self) -> int:
        """Tokens of a decoder's states.

        Raises:
            UserError: it has no states.
        """
        for state in self.description(EXTEND).state:
            shape = state.type.stateType.arrayType.shape  # [B, H, capacity, Dh]
            if len(shape) == 4:
                return int(shape[2])
        raise UserError(f"{self.folder} has no states, so it is no decoder.")

    def check_lengths(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError where a flexible input of a function is given a length outside of its range."""
        for feature in self.description(name).input:
            ranges = feature.type.multiArrayType.shapeRange.sizeRanges
            for size, allowed in zip(shapes.get(feature.name, ()), ranges, strict=False):
                if not allowed.lowerBound <= size <= allowed.upperBound:
                    raise UserError(
                        f"{name} of {self.folder.name} takes {feature.name} of {allowed.lowerBound} to"
                        f" {allowed.upperBound}, got {list(shapes[feature.name])}."
                    )

    def description(self, name: str) -> Any:
        """Inputs, outputs and states of a function as apps see them."""
        several = {item.name: item for item in self.model.description.functions}
        return several.get(name, self.model.description)


def identifier(name: str) -> str:
    """A name in the letters that MIL allows; ``low.norm`` and ``low_norm`` stay two."""
    return re.sub(r"\W", "_", name.replace(".", "__"))


def package_folder(file: Path) -> Path:
    """The package that a file lies in.

    Raises:
        UserError: it lies in none.
    """
    for folder in file.parents:
        if folder.suffix == SUFFIX:
            return folder
    raise UserError(f"{file} lies in no Core ML package.")


def package_files(folder: Path) -> Iterator[Path]:
    """All files of a package, the specification first."""
    yield folder / SPECIFICATION
    yield from sorted(item for item in folder.rglob("*") if item.is_file() and item != folder / SPECIFICATION)


def check_manifest(folder: Path) -> None:
    """Raise UserError where the package's own manifest does not lead to its specification."""
    raw = read_json(folder / "Manifest.json")
    try:
        root = raw["itemInfoEntries"][raw["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'Manifest.json'} names no model.") from error
    if f"Data/{root}" != SPECIFICATION:
        raise UserError(f"{folder / 'Manifest.json'} names {root!r}, which is not the package's model.")
