"""Interpreter of Core ML packages; it rounds each operator's outputs to the type they declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from runtimes.backends.mil.operators import EXACT, OPERATORS
from runtimes.backends.mil.package import Package, identifier
from runtimes.backends.mil.tensor_type import FLOATS, TensorType, read_immediate
from runtimes.backends.mil.threads import blas_threads, check_threads
from runtimes.backends.static_shape import DECODE
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError, first_line
from runtimes.memory import available_memory


@dataclass(frozen=True)
class Step:
    """One operator of a function, ready to run.

    Args:
        kind: operator type, as ``linear``.
        name: name of the operator in the package.
        inputs: parameter → ``Ref``, constant, or a list of these.
        outputs: names and types of the outputs.
        last_uses: names of the values that no later operator reads.
    """

    kind: str
    name: str
    inputs: dict[str, Any]
    outputs: tuple[tuple[str, TensorType], ...]
    last_uses: tuple[str, ...]


@dataclass(frozen=True)
class Ref:
    """A reference to a value by its name."""

    name: str


class Function:
    """A function of a package, ready to run.

    Each weight is read at its first use.

    Args:
        package: the package.
        name: name of the function.
        dense: weights that functions of the package have read and decompressed, by their offsets in
            the weight file; the functions of a package share it.

    Raises:
        UserError: the function has an unknown operator, or reads a value that nothing computes.
    """

    def __init__(self, package: Package, name: str, dense: MutableMapping[Any, Any]) -> None:
        """Check all operators and constants of the function."""
        self.package, self.name, self._dense = package, name, dense
        proto = package.function(name)
        block = proto.block_specializations[proto.opset]
        self._constants: dict[str, Callable[[], Any]] = {}
        self._loaded: dict[str, Any] = {}
        try:
            self.inputs = {item.name: TensorType.from_proto(item.type) for item in proto.inputs}
            states = [item.name for item in proto.inputs if item.type.HasField("stateType")]
            self.states = {key: self.inputs.pop(key) for key in states}
            declared = dict(self.inputs)
            self._steps = list(self._prepare(block, declared))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{name} of {package.folder} is malformed: {first_line(error)}.") from error
        try:
            self.outputs = {key: declared[key] for key in block.outputs}
        except KeyError as error:
            raise UserError(
                f"{name} of {package.folder} has the output {error}, which no operator computes."
            ) from error

    def _prepare(self, block: Any, declared: dict[str, TensorType]) -> Iterator[Step]:
        """Yield the checked steps; add the type of every value to ``declared``."""
        last_uses = _last_uses(block)
        for index, operation in enumerate(block.operations):
            kind = operation.type
            name = _text(operation.attributes["name"]) if "name" in operation.attributes else kind
            if kind not in OPERATORS and kind not in ("const", "read_state", "write_state"):
                raise UserError(
                    f"{self.package.folder} uses the operator {kind!r} ({name}), which the MIL interpreter"
                    " does not know."
                )
            outputs = tuple((item.name, TensorType.from_proto(item.type)) for item in operation.outputs)
            if kind == "const":
                self._constants[outputs[0][0]] = self._constant(operation.attributes["val"])
            elif kind.startswith("constexpr_"):
                self._constants[outputs[0][0]] = self._decompress(operation, *outputs[0])
            else:
                inputs = {key: self._argument(key, item) for key, item in operation.inputs.items()}
                for ref in _references(inputs):
                    if ref not in declared and ref not in self._constants and ref not in self.states:
                        raise UserError(f"{kind} ({name}) of {self.package.folder} reads {ref!r}, which is"
                                        " not computed before it.")  # fmt: skip
                declared |= outputs
                yield Step(kind, name, inputs, outputs, tuple(last_uses.get(index, ())))

    def _argument(self, key: str, argument: Any) -> Any:
        """Return a reference or a constant; a list of them for the parameter ``values``."""
        bindings = [
            Ref(binding.name) if binding.name else self._constant(binding.value)()
            for binding in argument.arguments
        ]
        return bindings if key == "values" else bindings[0]

    def _constant(self, value: Any) -> Callable[[], Any]:
        """Return the loader of a constant; the record of one in the weight file is checked now."""
        declared = TensorType.from_proto(value.type)
        if value.WhichOneof("value") == "immediateValue":
            return partial(read_immediate, value, declared)
        offset, shape = int(value.blobFileValue.offset), tuple(int(size or 0) for size in declared.shape)
        self.package.weights.check(offset, shape)

        def load() -> Any:
            stored = self.package.weights.read(offset, shape)
            return stored.astype(np.float32) if declared.dtype in FLOATS else stored

        return partial(self._load_shared, offset, load)

    def _decompress(self, operation: Any, name: str, declared: TensorType) -> Callable[[], Any]:
        """Return the loader of a compressed weight, which decompresses it."""
        values = {key: item.arguments[0].value for key, item in operation.inputs.items()}
        parts = {key: self._constant(value) for key, value in values.items()}
        offsets = {key: int(value.blobFileValue.offset) for key, value in values.items()}

        def load() -> Any:
            arguments = {key: part() for key, part in parts.items()}
            for offset in offsets.values():  # keep the weight, not its parts
                self._dense.pop(offset, None)
            return declared.cast(OPERATORS[operation.type](**arguments), False, name)

        if not all(offsets.values()):  # a part is in the protobuf: offsets do not identify it
            return load
        return partial(self._load_shared, (operation.type, *sorted(offsets.items())), load)

    def _load_shared(self, key: Any, load: Callable[[], Any]) -> Any:
        """Return a weight that functions of the package share; load it at the first use."""
        if key not in self._dense:
            self._dense[key] = load()
        return self._dense[key]

    def _load(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._constants[name]()
        return self._loaded[name]

    def run(
        self, inputs: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the outputs by name and update the states in place.

        Raises:
            UserError: an input or a state does not fit, or an operator cannot be computed.
        """
        values = self._run(inputs, states or {}, {}, {})
        return {name: values[name] for name in self.outputs}

    def run_with_replacements(
        self,
        inputs: Mapping[str, np.ndarray],
        states: Mapping[str, np.ndarray],
        replacements: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Return the computed values of variables whose readers get ``replacements`` instead.

        Raises:
            UserError: as in ``run``, or the function does not compute one of the variables.
        """
        computed: dict[str, np.ndarray] = {}
        self._run(inputs, states, replacements, computed)
        if missing := replacements.keys() - computed.keys():
            raise UserError(f"{self.name} of {self.package.folder} does not compute {min(missing)}.")
        return computed

    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        states: Mapping[str, np.ndarray],
        replacements: Mapping[str, np.ndarray],
        computed: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Return the values at the end; add to ``computed`` the values that were replaced."""
        values: dict[str, np.ndarray] = {}
        for types, arrays in ((self.inputs, inputs), (self.states, states)):
            for name, declared in types.items():
                if name not in arrays or not declared.fits(arrays[name].shape):
                    shape = list(arrays[name].shape) if name in arrays else "nothing"
                    raise UserError(
                        f"{self.name} of {self.package.folder.name} takes {name} as"
                        f" {list(declared.shape)}, got {shape}."
                    )
        for name, declared in self.inputs.items():
            values[name] = declared.cast(inputs[name], False, name)
        for step in self._steps:
            try:
                self._run_step(step, values, states)
            except (ValueError, IndexError, KeyError, TypeError, NotImplementedError) as error:
                raise UserError(
                    f"{step.kind} ({step.name}) of {self.package.folder.name} cannot be computed: {error}."
                ) from error
            for name, declared in step.outputs:
                if name in replacements:
                    computed[name] = values[name]
                    values[name] = declared.cast(replacements[name], False, name)
            for name in step.last_uses:
                values.pop(name, None)
        return values

    def _run_step(self, step: Step, values: dict[str, np.ndarray], states: Mapping[str, np.ndarray]) -> None:
        def resolve(item: Any) -> Any:
            if isinstance(item, list):
                return [resolve(element) for element in item]
            if isinstance(item, Ref):
                return values[item.name] if item.name in values else self._load(item.name)
            return item

        if step.kind == "write_state":
            states[step.inputs["input"].name][...] = resolve(step.inputs["data"])
            return
        if step.kind == "read_state":
            result: Any = states[step.inputs["input"].name].astype(np.float32)
        else:
            operator: Callable[..., Any] = OPERATORS[step.kind]
            result = operator(**{key: resolve(item) for key, item in step.inputs.items()})
        results = result if isinstance(result, list) else [result]
        exact = step.kind in EXACT or step.kind == "read_state"
        for (name, declared), value in zip(step.outputs, results, strict=True):
            values[name] = declared.cast(value, exact, name)


class InterpretedAsset:
    """A package whose functions the interpreter runs; they share decompressed weights.

    Args:
        package: the package to run.
        contract: contract of its component.
        threads: the most CPU threads of a call; None leaves numpy's default.

    Raises:
        UserError: the weights do not fit into memory in float32, or ``threads`` is given and
            threadpoolctl is not installed.
    """

    def __init__(self, package: Package, contract: Contract, threads: int | None = None) -> None:
        """Check the memory that the weights need; nothing is loaded yet."""
        check_threads(threads)
        self._package, self._contract, self._threads = package, contract, threads
        self._functions: dict[str, Function] = {}
        self._dense: dict[Any, np.ndarray] = {}
        needed, free = package.count_weights() * 4, available_memory()
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
            outputs = self._functions[name].outputs
            for spec in self._contract.outputs:
                if identifier(spec.name) not in outputs:
                    raise UserError(f"{name} of {self._package.folder} does not give {spec.name}.")
        return self._functions[name]

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Return the outputs of a function.

        Images are ``uint8 [N, N, 3]``; the function gets them as from Core ML, ``[1, 3, N, N]``.
        """
        arrays = {
            name: array.transpose(2, 0, 1)[None] if array.dtype == np.uint8 else array
            for name, array in inputs.items()
        }
        self._package.check_lengths(function, {name: array.shape for name, array in arrays.items()})
        with blas_threads(self._threads):
            outputs = self._function(function).run(arrays, state or {})
        return {spec.name: outputs[identifier(spec.name)] for spec in self._contract.outputs}

    def new_state(self) -> dict[str, np.ndarray]:
        """Return the zeroed states of one sequence."""
        return {
            name: np.zeros([int(size or 0) for size in declared.shape], np.float16)
            for name, declared in self._function(DECODE).states.items()
        }

    def read_state(self, state: dict[str, np.ndarray], name: str) -> np.ndarray:
        """Return a state ``[1, Hkv, C, Dh]``."""
        return state[name]

    def write_state(self, state: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
        """Replace a state ``[1, Hkv, C, Dh]``."""
        state[name][...] = array


def _last_uses(block: Any) -> dict[int, list[str]]:
    """Return, for the number of an operation, the names that it is the last to read."""
    last = dict.fromkeys(block.outputs, len(block.operations))
    for index, operation in reversed(list(enumerate(block.operations))):
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                last.setdefault(binding.name, index)
    names: dict[int, list[str]] = {}
    for name, index in last.items():
        names.setdefault(index, []).append(name)
    return names


def _references(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that an operator's inputs refer to."""
    for item in inputs.values():
        for element in item if isinstance(item, list) else [item]:
            if isinstance(element, Ref):
                yield element.name


def _text(value: Any) -> str:
    return str(value.immediateValue.tensor.strings.values[0])
