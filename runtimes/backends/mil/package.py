"""Reader of a Core ML package on disk: its manifest, its protobuf and its functions."""

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
# Keys that dsvl-export adds to a package's metadata.
TAPS = "dsvl_export.taps"  # function → tap → name of the variable
CONTRACT = "dsvl_export.contract"  # of the component, as in the bundle's manifest
PREPROCESSING = "dsvl_export.preprocessing"  # of the images, as in the bundle's manifest
# Functions beside MAIN and DECODE: one of the vision encoder, two of the decoder.
IMAGE, EXTEND, PREFILL = "image", "extend", "prefill"
CHUNK = 256  # tokens in a call of PREFILL, and the maximum in a call of EXTEND
_PROTO = "_dsvl_export_coreml_proto"


def messages() -> Any:
    """Return the module of Core ML's protobuf messages.

    Its files belong to coremltools. They are imported without coremltools itself, which would
    import torch.

    Raises:
        UserError: coremltools is not installed.
    """
    if _PROTO not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or spec.origin is None:
            raise UserError(
                f"Reading Core ML packages needs coremltools; run: {install_command('coremltools')}."
            )
        package = ModuleType(_PROTO)
        package.__path__ = [str(Path(spec.origin).parent / "proto")]
        sys.modules[_PROTO] = package
    return importlib.import_module(f"{_PROTO}.Model_pb2")


class Package:
    """A ``.mlpackage`` with an ML program.

    Raises:
        UserError: the folder is not such a package, or the package is damaged.
    """

    def __init__(self, folder: Path) -> None:
        """Parse the protobuf in ``folder``."""
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
            raise UserError(f"{folder} does not contain an ML program.")

    @cached_property
    def weights(self) -> WeightFile:
        """The package's weight file."""
        return WeightFile(self.folder / WEIGHTS)

    @property
    def metadata(self) -> dict[str, str]:
        """The user-defined metadata of the model."""
        return dict(self.model.description.metadata.userDefined)

    @property
    def function_names(self) -> list[str]:
        """Names of the functions, sorted."""
        return sorted(self.model.mlProgram.functions)

    def function(self, name: str) -> Any:
        """Return the protobuf of a function.

        Raises:
            UserError: the package has no function of that name.
        """
        functions = self.model.mlProgram.functions
        if name not in functions:
            raise UserError(
                f"{self.folder} has no function {name!r}; there are {', '.join(self.function_names)}."
            )
        return functions[name]

    def count_weights(self) -> int:
        """Return the number of values in all weights; weights that functions share count once."""
        counts: dict[str, int] = {}
        for name in self.function_names:
            proto = self.function(name)
            for operation in proto.block_specializations[proto.opset].operations:
                if operation.type == "const" or operation.type.startswith("constexpr_"):
                    for output in operation.outputs:
                        sizes = [dim.constant.size for dim in output.type.tensorType.dimensions]
                        counts[output.name] = prod(sizes)
        return sum(counts.values())

    def capacity(self) -> int:
        """Return the number of tokens that a decoder's states hold.

        Raises:
            UserError: the package has no states.
        """
        for state in self.description(EXTEND).state:
            shape = state.type.stateType.arrayType.shape  # [B, H, capacity, Dh]
            if len(shape) == 4:
                return int(shape[2])
        raise UserError(f"{self.folder} has no states, so it is not a decoder.")

    def check_lengths(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the lengths of a function's flexible inputs.

        Raises:
            UserError: a length is outside the range that the package declares.
        """
        for feature in self.description(name).input:
            ranges = feature.type.multiArrayType.shapeRange.sizeRanges
            for size, allowed in zip(shapes.get(feature.name, ()), ranges, strict=False):
                if not allowed.lowerBound <= size <= allowed.upperBound:
                    raise UserError(
                        f"{name} of {self.folder.name} takes {feature.name} of {allowed.lowerBound} to"
                        f" {allowed.upperBound}, got {list(shapes[feature.name])}."
                    )

    def description(self, name: str) -> Any:
        """Return the description of a function's inputs, outputs and states, as apps see them."""
        functions = {item.name: item for item in self.model.description.functions}
        return functions.get(name, self.model.description)


def identifier(name: str) -> str:
    """Return a name in MIL's characters; ``low.norm`` and ``low_norm`` stay different."""
    return re.sub(r"\W", "_", name.replace(".", "__"))


def package_folder(file: Path) -> Path:
    """Return the package that contains a file.

    Raises:
        UserError: no parent folder of the file is a package.
    """
    for folder in file.parents:
        if folder.suffix == SUFFIX:
            return folder
    raise UserError(f"{file} is not in a Core ML package.")


def package_files(folder: Path) -> Iterator[Path]:
    """Yield all files of a package, the specification first."""
    yield folder / SPECIFICATION
    yield from sorted(item for item in folder.rglob("*") if item.is_file() and item != folder / SPECIFICATION)


def check_manifest(folder: Path) -> None:
    """Check that the package's own manifest refers to its specification.

    Raises:
        UserError: the manifest is malformed or names another file.
    """
    raw = read_json(folder / "Manifest.json")
    try:
        root = raw["itemInfoEntries"][raw["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'Manifest.json'} does not name a model.") from error
    if f"Data/{root}" != SPECIFICATION:
        raise UserError(f"{folder / 'Manifest.json'} names {root!r}, which is not the package's model.")
