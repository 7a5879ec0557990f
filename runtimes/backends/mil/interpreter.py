"""Packages executed step by step, rounding after each operator to the type that the package declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from runtimes.backends.mil.operators import EXACT, OPERATORS
from runtimes.backends.mil.package import Package, identifier, messages
from runtimes.backends.static_shape import DECODE
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError, first_line
from runtimes.memory import available_memory

FLOATS = ("FLOAT16", "FLOAT32")
HELD_AS = {"FLOAT16": np.float32, "FLOAT32": np.float32, "INT32": np.int32, "INT8": np.int8,
           "UINT8": np.uint8, "BOOL": np.bool_}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """The type that a package declares: None where a size is flexible, or for what is no tensor."""

    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, proto: Any) -> Declared:
        names = import_module(messages().__name__.replace("Model_pb2", "MIL_pb2")).DataType
        tensor = proto.stateType.wrappedType.tensorType if proto.HasField("stateType") else proto.tensorType
        sizes = tuple(
            int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else None
            for dim in tensor.dimensions
        )
        return cls(names.Name(tensor.dataType), sizes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            wanted in (None, size) for wanted, size in zip(self.shape, shape, strict=True)
        )

    def held(self, value: Any, exact: bool, name: str) -> np.ndarray:
        """A value in this type, as the interpreter keeps it.

        Raises:
            ValueError: its shape is another.
        """
        array = np.asarray(value)
        if not self.fits(array.shape):
            raise ValueError(
                f"{name} is declared as {self.dtype}{list(self.shape)}, but is {list(array.shape)}"
            )
        if self.dtype == "FLOAT16" and not exact:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
        return array.astype(HELD_AS.get(self.dtype, array.dtype), copy=False)


@dataclass(frozen=True)
class Step:
    """One operator: what it reads (names, lists of names, or values), and what it gives."""

    kind: str
    name: str
    reads: dict[str, Any]
    outputs: tuple[tuple[str, Declared], ...]
    last_uses: tuple[str, ...]  # values that nothing reads afterwards


@dataclass(frozen=True)
class Ref:
    """A value by its name."""

    name: str


class Function:
    """A function of a package, ready to run.

    Weights are read when they are needed first.

    Args:
        dense: weights that other functions of the package have read, by their places in the weight file.

    Raises:
        UserError: it has an operator that is not known here, or names what is not there.
    """

    def __init__(self, package: Package, name: str, dense: MutableMapping[Any, Any]) -> None:
        self.package, self.name, self._dense = package, name, dense
        proto = package.function(name)
        block = proto.block_specializations[proto.opset]
        self._constants: dict[str, Callable[[], Any]] = {}
        self._loaded: dict[str, Any] = {}
        try:
            self.inputs = {item.name: Declared.of(item.type) for item in proto.inputs}
            states = [item.name for item in proto.inputs if item.type.HasField("stateType")]
            self.states = {key: self.inputs.pop(key) for key in states}
            declared = dict(self.inputs)
            self._steps = list(self._prepared(block, declared))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{name} of {package.folder} is malformed: {first_line(error)}.") from error
        try:
            self.outputs = {key: declared[key] for key in block.outputs}
        except KeyError as error:
            raise UserError(f"{name} of {package.folder} gives {error}, which nothing computes.") from error

    def _prepared(self, block: Any, declared: dict[str, Declared]) -> Iterator[Step]:
        """The steps, each checked to be one that can be run; fills in what is declared of every value."""
        ends = _last_uses(block)
        for index, operation in enumerate(block.operations):
            kind = operation.type
            name = _text(operation.attributes["name"]) if "name" in operation.attributes else kind
            if kind not in OPERATORS and kind not in ("const", "read_state", "write_state"):
                raise UserError(
                    f"{self.package.folder} uses the operator {kind!r} ({name}), which the MIL interpreter"
                    " does not know."
                )
            outputs = tuple((item.name, Declared.of(item.type)) for item in operation.outputs)
            if kind == "const":
                self._constants[outputs[0][0]] = self._constant(operation.attributes["val"])
            elif kind.startswith("constexpr_"):
                self._constants[outputs[0][0]] = self._decompressed(operation, *outputs[0])
            else:
                reads = {key: self._argument(key, item) for key, item in operation.inputs.items()}
                for ref in _refs(reads):
                    if ref not in declared and ref not in self._constants and ref not in self.states:
                        raise UserError(f"{kind} ({name}) of {self.package.folder} reads {ref!r}, which is"
                                        " not computed before it.")  # fmt: skip
                declared |= outputs
                yield Step(kind, name, reads, outputs, tuple(ends.get(index, ())))

    def _argument(self, key: str, argument: Any) -> Any:
        """A name, or a constant; a list of them for what takes several."""
        found = [
            Ref(binding.name) if binding.name else self._constant(binding.value)()
            for binding in argument.arguments
        ]
        return found if key == "values" else found[0]

    def _constant(self, value: Any) -> Callable[[], Any]:
        """What gives a constant; one in the weight file is looked for now and read when it is needed."""
        declared = Declared.of(value.type)
        if value.WhichOneof("value") == "immediateValue":
            return partial(_immediate, value, declared)
        offset, shape = int(value.blobFileValue.offset), tuple(int(size or 0) for size in declared.shape)
        self.package.weights.check(offset, shape)

        def load() -> Any:
            stored = self.package.weights.read(offset, shape)
            return stored.astype(np.float32) if declared.dtype in FLOATS else stored

        return partial(self._shared, offset, load)

    def _decompressed(self, operation: Any, name: str, declared: Declared) -> Callable[[], Any]:
        values = {key: item.arguments[0].value for key, item in operation.inputs.items()}
        parts = {key: self._constant(value) for key, value in values.items()}
        places = {key: int(value.blobFileValue.offset) for key, value in values.items()}

        def load() -> Any:
            given = {key: part() for key, part in parts.items()}
            for key in places.values():  # the weight itself is kept, its parts are not
                self._dense.pop(key, None)
            return declared.held(OPERATORS[operation.type](**given), False, name)

        if not all(places.values()):  # something lies in the protobuf: nothing to share it by
            return load
        return partial(self._shared, (operation.type, *sorted(places.items())), load)

    def _shared(self, place: Any, load: Callable[[], Any]) -> Any:
        """A weight, which functions of the package share."""
        if place not in self._dense:
            self._dense[place] = load()
        return self._dense[place]

    def _read(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._constants[name]()
        return self._loaded[name]

    def run(
        self, inputs: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name; states are updated in place.

        Raises:
            UserError: an input or a state does not fit, or an operator cannot be computed.
        """
        values = self._run(inputs, states or {}, {}, {})
        return {name: values[name] for name in self.outputs}

    def run_handed(
        self,
        inputs: Mapping[str, np.ndarray],
        states: Mapping[str, np.ndarray],
        handed: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """What the variables in ``handed`` are, where all that reads one reads the array in its place.

        Raises:
            UserError: as in ``run``, or there is no such variable.
        """
        computed: dict[str, np.ndarray] = {}
        self._run(inputs, states, handed, computed)
        if missing := handed.keys() - computed.keys():
            raise UserError(f"{self.name} of {self.package.folder} does not compute {min(missing)}.")
        return computed

    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        states: Mapping[str, np.ndarray],
        handed: Mapping[str, np.ndarray],
        computed: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """The values at the end; ``computed`` takes those that ``handed`` takes the place of."""
        values: dict[str, np.ndarray] = {}
        for table, given in ((self.inputs, inputs), (self.states, states)):
            for name, declared in table.items():
                if name not in given or not declared.fits(given[name].shape):
                    found = list(given[name].shape) if name in given else "nothing"
                    raise UserError(
                        f"{self.name} of {self.package.folder.name} takes {name} as"
                        f" {list(declared.shape)}, got {found}."
                    )
        for name, declared in self.inputs.items():
            values[name] = declared.held(inputs[name], False, name)
        for step in self._steps:
            try:
                self._run_step(step, values, states)
            except (ValueError, IndexError, KeyError, TypeError, NotImplementedError) as error:
                raise UserError(
                    f"{step.kind} ({step.name}) of {self.package.folder.name} cannot be computed: {error}."
                ) from error
            for name, declared in step.outputs:
                if name in handed:
                    computed[name] = values[name]
                    values[name] = declared.held(handed[name], False, name)
            for name in step.last_uses:
                values.pop(name, None)
        return values

    def _run_step(self, step: Step, values: dict[str, np.ndarray], states: Mapping[str, np.ndarray]) -> None:
        def resolved(item: Any) -> Any:
            if isinstance(item, list):
                return [resolved(one) for one in item]
            if isinstance(item, Ref):
                return values[item.name] if item.name in values else self._read(item.name)
            return item

        if step.kind == "write_state":
            states[step.reads["input"].name][...] = resolved(step.reads["data"])
            return
        if step.kind == "read_state":
            found: Any = states[step.reads["input"].name].astype(np.float32)
        else:
            operator: Callable[..., Any] = OPERATORS[step.kind]
            found = operator(**{key: resolved(item) for key, item in step.reads.items()})
        several = found if isinstance(found, list) else [found]
        exact = step.kind in EXACT or step.kind == "read_state"
        for (name, declared), value in zip(step.outputs, several, strict=True):
            values[name] = declared.held(value, exact, name)


class InterpretedAsset:
    """A package whose functions are interpreted when they are called; they share decompressed weights.

    Raises:
        UserError: its weights do not fit into memory in float32.
    """

    def __init__(self, package: Package, contract: Contract) -> None:
        self._package, self._contract = package, contract
        self._functions: dict[str, Function] = {}
        self._dense: dict[Any, np.ndarray] = {}
        needed, free = package.values() * 4, available_memory()
        if needed > free:
            raise UserError(
                f"The MIL interpreter needs {needed / 1e9:.1f} GB of memory for the weights of"
                f" {package.folder.name}, {free / 1e9:.1f} GB are free."
            )

    def _function(self, name: str) -> Function:
        if name not in self._functions:
            try:
                self._functions[name] = Function(self._package, name, self._dense)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                reason = f"{name} of {self._package.folder} cannot be read ({first_line(error)})"
                raise UserError(f"{reason}; the package is damaged.") from error
            given = self._functions[name].outputs
            for spec in self._contract.outputs:
                if identifier(spec.name) not in given:
                    raise UserError(f"{name} of {self._package.folder} does not give {spec.name}.")
        return self._functions[name]

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Outputs of a function; images ``uint8 [N, N, 3]`` reach it as in Core ML, ``[1, 3, N, N]``."""
        given = {
            name: array.transpose(2, 0, 1)[None] if array.dtype == np.uint8 else array
            for name, array in inputs.items()
        }
        self._package.check_lengths(function, {name: array.shape for name, array in given.items()})
        found = self._function(function).run(given, state or {})
        return {spec.name: found[identifier(spec.name)] for spec in self._contract.outputs}

    def new_state(self) -> dict[str, np.ndarray]:
        return {
            name: np.zeros([int(size or 0) for size in declared.shape], np.float16)
            for name, declared in self._function(DECODE).states.items()
        }

    def read_state(self, state: dict[str, np.ndarray], name: str) -> np.ndarray:
        return state[name]

    def write_state(self, state: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
        state[name][...] = array


def _last_uses(block: Any) -> dict[int, list[str]]:
    """Names that are read for the last time, by the number of the operation that does."""
    last = dict.fromkeys(block.outputs, len(block.operations))
    for index, operation in reversed(list(enumerate(block.operations))):
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                last.setdefault(binding.name, index)
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        ends.setdefault(index, []).append(name)
    return ends


def _refs(reads: Mapping[str, Any]) -> Iterator[str]:
    for item in reads.values():
        for one in item if isinstance(item, list) else [item]:
            if isinstance(one, Ref):
                yield one.name


def _text(value: Any) -> str:
    return str(value.immediateValue.tensor.strings.values[0])


def _immediate(value: Any, declared: Declared) -> Any:
    """A constant of the protobuf: a string, a number, or an array."""
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
    array: np.ndarray = raw.astype(HELD_AS[declared.dtype]).reshape(
        [int(size or 0) for size in declared.shape]
    )
    return array if declared.shape else array.item() if declared.dtype == "BOOL" else array[()]
