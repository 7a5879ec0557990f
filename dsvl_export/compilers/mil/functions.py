"""The functions of each component's package, and their features as apps see them.

The decoder has fixed lengths for the Neural Engine, which supports no others (``decode``: one
token, ``prefill``: a chunk), and a flexible length for the GPU (``extend``). The vision encoder
also has a function that takes an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Placeholder, get_new_symbol, types
from coremltools.converters.mil.mil.program import StateTensorPlaceholder

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.mil.context import MIL_TYPES, Weights
from dsvl_export.compilers.mil.lower import lower
from reference.taps import tap_nodes
from reference.trace import TracedComponent
from runtimes.backends.mil.package import CHUNK, EXTEND, IMAGE, PREFILL
from runtimes.backends.static_shape import DECODE, MAIN
from runtimes.bundle.contracts import TensorSpec
from runtimes.preprocess import PreprocessSpec

TARGET = coremltools.target.iOS18
Size = int | tuple[int, int]  # fixed, or from and to


@dataclass(frozen=True)
class Feature:
    """An input, output or state of a function.

    Args:
        name: its name.
        dtype: its dtype.
        shape: its shape; a flexible size is a range.
        meaning: description for apps.
        image: whether it is passed as an image, not as an array.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    meaning: str
    image: bool = False


@dataclass(frozen=True)
class BuiltFunction:
    """A function of a MIL program.

    Args:
        function: coremltools' function.
        inputs: features of the inputs.
        outputs: features of the outputs.
        states: features of the states.
        taps: tap → the variable that holds it.
    """

    function: Any
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    taps: dict[str, str]


def build_functions(
    traced: TracedComponent,
    load: LoadParameter,
    weights: Weights,
    capacity: int,
    preprocessing: PreprocessSpec | None,
) -> dict[str, BuiltFunction]:
    """Build all functions of a component, the default first.

    Args:
        traced: the component.
        load: loads a parameter by name.
        weights: receives the constants of all functions.
        capacity: tokens of the KV cache.
        preprocessing: the model's preprocessing; with it, the vision encoder gets a function that
            takes an image.
    """
    component = traced.contract.component
    if component == "decoder":
        chunk = min(CHUNK, capacity)
        function_sizes: dict[str, dict[str, Size]] = {
            EXTEND: {"sequence": (1, chunk), "rows": (1, chunk)},
            DECODE: {"sequence": 1, "rows": 1},
            PREFILL: {"sequence": chunk, "rows": 1},
        }
        function_sizes = {name: {**sizes, "capacity": capacity} for name, sizes in function_sizes.items()}
        return {name: _build(traced, load, weights, sizes) for name, sizes in function_sizes.items()}
    functions = {MAIN: _build(traced, load, weights, {})}
    if component == "vision_encoder" and preprocessing:
        functions[IMAGE] = _build(traced, load, weights, {}, preprocessing)
    return functions


def _build(
    traced: TracedComponent,
    load: LoadParameter,
    weights: Weights,
    sizes: dict[str, Size],
    preprocessing: PreprocessSpec | None = None,
) -> BuiltFunction:
    contract, sizes = traced.contract, {"batch": 1, **sizes}

    def feature(spec: TensorSpec) -> Feature:
        shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
        return Feature(spec.name, spec.dtype, shape, spec.meaning)

    inputs = tuple(map(feature, contract.inputs))
    if preprocessing:
        (pixels,) = inputs
        meaning = "RGB image, square and of the model's size; see the preprocessing spec"
        inputs = (replace(pixels, name="image", meaning=meaning, image=True),)
    states = tuple(map(feature, contract.states))
    symbols = {dim: get_new_symbol() for dim, size in sizes.items() if isinstance(size, tuple)}
    placeholders: dict[str, Any] = {}
    for item, spec in zip((*inputs, *states), (*contract.inputs, *contract.states), strict=True):
        shape = [symbols.get(str(dim), size) for dim, size in zip(spec.shape, item.shape, strict=True)]
        if item in states:
            placeholders[item.name] = StateTensorPlaceholder(shape, dtype=types.fp16)
        else:
            placeholders[item.name] = Placeholder(shape, dtype=MIL_TYPES[item.dtype])
    fixed = {dim: size for dim, size in sizes.items() if isinstance(size, int)}
    mb.name_count.clear()  # of constants that it names itself: the same in every export
    with Function(placeholders, opset_version=TARGET) as function:
        given = dict(function.inputs)
        if preprocessing:
            given = {contract.inputs[0].name: _normalized(given.pop("image"), preprocessing)}
        lowering = lower(traced, load, weights, given, fixed)
        function.set_outputs(lowering.outputs)
    taps = {tap: lowering.value(node).name for tap, node in tap_nodes(traced.program, traced.taps).items()}
    return BuiltFunction(function, inputs, tuple(map(feature, contract.outputs)), states, taps)


def _normalized(image: Any, spec: PreprocessSpec) -> Any:
    """Normalize pixels from 0 to 255 as the preprocessing does.

    The mean is subtracted first: half precision represents most pixels less the mean exactly, and
    they are scaled once.
    """
    mean, std = (np.array(values, np.float64).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
    if not spec.do_normalize:
        return mb.mul(x=image, y=np.float16(spec.rescale_factor))
    centered = mb.sub(x=image, y=(mean / spec.rescale_factor).astype(np.float16))
    return mb.mul(x=centered, y=(spec.rescale_factor / std).astype(np.float16))
