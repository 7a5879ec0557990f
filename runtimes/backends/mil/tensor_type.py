"""The types of values in MIL programs, and how the interpreter stores values of a type."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from runtimes.backends.mil.package import messages

FLOATS = ("FLOAT16", "FLOAT32")
# MIL's data type → the numpy dtype in which the interpreter stores values of this type.
NUMPY_TYPES = {"FLOAT16": np.float32, "FLOAT32": np.float32, "INT32": np.int32, "INT8": np.int8,
               "UINT8": np.uint8, "BOOL": np.bool_}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """The declared type of a value: its dtype, and its sizes (None where flexible)."""

    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def from_proto(cls, proto: Any) -> TensorType:
        """Read the type from a ``ValueType`` message, of a tensor or of a state."""
        names = import_module(messages().__name__.replace("Model_pb2", "MIL_pb2")).DataType
        tensor = proto.stateType.wrappedType.tensorType if proto.HasField("stateType") else proto.tensorType
        sizes = tuple(
            int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else None
            for dim in tensor.dimensions
        )
        return cls(names.Name(tensor.dataType), sizes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a shape has the declared sizes; a flexible size accepts any."""
        return len(shape) == len(self.shape) and all(
            declared in (None, size) for declared, size in zip(self.shape, shape, strict=True)
        )

    def cast(self, value: Any, exact: bool, name: str) -> np.ndarray:
        """Return a value in this type, as the interpreter stores it.

        Args:
            value: an array or a number.
            exact: the value has no more precision than this type, so it is not rounded.
            name: name of the value, for the error.

        Raises:
            ValueError: the value does not have the declared shape.
        """
        array = np.asarray(value)
        if not self.fits(array.shape):
            raise ValueError(
                f"{name} is declared as {self.dtype}{list(self.shape)}, but is {list(array.shape)}"
            )
        if self.dtype == "FLOAT16" and not exact:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
        return array.astype(NUMPY_TYPES.get(self.dtype, array.dtype), copy=False)


def read_immediate(value: Any, declared: TensorType) -> Any:
    """Return a constant of the protobuf: a string, a number, or an array."""
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "strings":
        texts = list(tensor.strings.values)
        return texts[0] if not declared.shape else texts
    if kind == "bytes":
        stored = {"FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8}[declared.dtype]
        raw = np.frombuffer(tensor.bytes.values, stored)
    else:
        raw = np.array(getattr(tensor, kind).values)
    array: np.ndarray = raw.astype(NUMPY_TYPES[declared.dtype]).reshape(
        [int(size or 0) for size in declared.shape]
    )
    return array if declared.shape else array.item() if declared.dtype == "BOOL" else array[()]
