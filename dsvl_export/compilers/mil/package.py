"""Write a package from MIL functions; weights stream into its file one at a time."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools
import numpy as np
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.backend.mil.load import MILProtoExporter
from coremltools.converters.mil.mil import Program
from coremltools.proto import FeatureTypes_pb2, Model_pb2

from dsvl_export.compilers.mil.context import Var, Weights
from dsvl_export.compilers.mil.functions import BuiltFunction
from dsvl_export.version import __version__
from reference.trace import TracedComponent
from runtimes.backends.mil.package import CONTRACT, PREPROCESSING, SPECIFICATION, SUFFIX, TAPS, WEIGHTS
from runtimes.preprocess import PreprocessSpec

SPECIFICATION_VERSION = 9  # iOS 18 and macOS 15: states, several functions, 4-bit weights in blocks
ARRAYS = FeatureTypes_pb2.ArrayFeatureType
ARRAY_TYPES = {"float16": ARRAYS.FLOAT16, "float32": ARRAYS.FLOAT32, "int64": ARRAYS.INT32}
NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of URLs, RFC 9562


class _StreamingExporter(MILProtoExporter):
    """coremltools' program writer, changed to load the values of a weight when it writes them."""

    def __init__(self, program: Any, folder: Path, weights: Weights, on_bytes: Callable[[int], None]) -> None:
        super().__init__(program, str(folder), SPECIFICATION_VERSION)
        self._weights, self._on_bytes = weights, on_bytes

    def create_file_value(self, var: Var) -> Any:
        name = var.op.weight_id
        if name not in self._weights.loaders or name in self.weight_id_to_file_value:
            return super().create_file_value(var)
        values = self._weights.loaders[name]()
        if values.shape != tuple(var.shape):
            raise ValueError(f"{name} has the shape {values.shape}, {tuple(var.shape)} was declared")
        writer = self.get_blob_writer(self.get_weight_path(var.op))
        loaded = SimpleNamespace(val=np.ascontiguousarray(values), dtype=var.dtype)
        file_value = helper.create_file_value_tensor(
            file_name=f"@model_path/{Path(WEIGHTS).parent.name}/{Path(WEIGHTS).name}",
            offset=helper._get_offset_by_writing_data(loaded, writer),
            dim=var.shape,
            data_type=helper.types_to_proto_primitive(var.dtype),
        )
        self.weight_id_to_file_value[name] = file_value
        self._on_bytes(self._weights.bytes[name])
        return file_value


def write_package(
    folder: Path,
    traced: TracedComponent,
    functions: Mapping[str, BuiltFunction],
    weights: Weights,
    preprocessing: PreprocessSpec | None,
    on_bytes: Callable[[int], None],
) -> Path:
    """Write ``<component>.mlpackage`` into a folder.

    Args:
        folder: the folder.
        traced: the component.
        functions: functions by name; the first one is the default.
        weights: the constants of all functions.
        preprocessing: written into the metadata, as the contract is, so that a package documents
            itself.
        on_bytes: called with the bytes of weights written, for progress.
    """
    program = Program()
    for name, built in functions.items():
        program.add_function(name, built.function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    package = folder / f"{traced.contract.component}{SUFFIX}"
    (package / WEIGHTS).parent.mkdir(parents=True)
    exporter = _StreamingExporter(program, (package / WEIGHTS).parent, weights, on_bytes)
    model = Model_pb2.Model(specificationVersion=SPECIFICATION_VERSION)
    model.mlProgram.CopyFrom(exporter.export())
    _describe(model, functions)
    about = model.description.metadata
    about.shortDescription = f"Vision-language model: {traced.contract.component.replace('_', ' ')}"
    about.author = f"dsvl-export {__version__}"
    about.versionString = __version__
    about.license = "The weights are under the license of their checkpoint."
    taps = {name: built.taps for name, built in functions.items()}
    about.userDefined["com.github.apple.coremltools.version"] = coremltools.__version__
    about.userDefined[TAPS] = json.dumps(taps)
    about.userDefined[CONTRACT] = json.dumps(asdict(traced.contract))
    if preprocessing:
        about.userDefined[PREPROCESSING] = json.dumps(asdict(preprocessing))
    (package / SPECIFICATION).write_bytes(model.SerializeToString(deterministic=True))
    _write_manifest(package)
    return package


def _write_manifest(package: Path) -> None:
    """Write the package's list of its two items; their ids are derived from their paths."""
    entries = {}
    for path, about in ((Path(SPECIFICATION), "Specification"), (Path(WEIGHTS).parent, "Weights")):
        relative = path.relative_to("Data").as_posix()
        entries[str(uuid.uuid5(NAMESPACE, relative))] = {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {about}",
            "name": path.name,
            "path": relative,
        }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4), encoding="utf-8")


def _describe(model: Any, functions: Mapping[str, BuiltFunction]) -> None:
    """Describe inputs, outputs and states as apps see them."""
    descriptions = []
    for name, built in functions.items():
        described = Model_pb2.FunctionDescription(name=name)
        for features, spec in (
            *((described.input, spec) for spec in built.inputs),
            *((described.output, spec) for spec in built.outputs),
            *((described.state, spec) for spec in built.states),
        ):
            feature = features.add(name=spec.name, shortDescription=spec.meaning)
            if spec.image:
                feature.type.imageType.width = feature.type.imageType.height = spec.shape[-1]
                feature.type.imageType.colorSpace = FeatureTypes_pb2.ImageFeatureType.RGB
                continue
            of_state = features is described.state
            array = feature.type.stateType.arrayType if of_state else feature.type.multiArrayType
            array.dataType = ARRAY_TYPES[spec.dtype]
            flexible = any(isinstance(size, tuple) for size in spec.shape)
            if flexible and features is described.output:
                continue  # Core ML finds out
            array.shape.extend(size[0] if isinstance(size, tuple) else size for size in spec.shape)
            if flexible:
                for size in spec.shape:
                    low, high = size if isinstance(size, tuple) else (size, size)
                    array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
        descriptions.append(described)
    if len(descriptions) > 1:
        model.description.functions.extend(descriptions)
        model.description.defaultFunctionName = descriptions[0].name
        return
    (only,) = descriptions
    for field in ("input", "output", "state"):
        getattr(model.description, field).extend(getattr(only, field))
