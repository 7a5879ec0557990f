"""Contracts: the inputs, outputs and states of each component.

A compiler checks its artifact against the contract, a session binds tensors by it, and tests
compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Dim = int | str  # a size, or the name of a size that is known at run time only


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype (numpy's name), shape and meaning of a tensor."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its named dimensions replaced by sizes."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)

    def allocate(self, sizes: Mapping[str, int]) -> np.ndarray:
        """Return zeros of this dtype and shape; ``sizes`` has the named dimensions."""
        return np.zeros(self.sized(sizes), self.dtype)

    def check(self, array: np.ndarray) -> None:
        """Check the dtype and shape of an array; named dimensions accept any size.

        Raises:
            ValueError: the array has another dtype or shape.
        """
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(self.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np.dtype(self.dtype):
            raise ValueError(
                f"{self.name} must be {self.dtype}{list(self.shape)}, got {array.dtype}{list(array.shape)}"
            )


def updated_state(state: TensorSpec) -> TensorSpec:
    """Return the output with a state after the step; it is bound to the state's own memory."""
    return replace(state, name=f"{state.name}_updated")


def appended_state(state: TensorSpec) -> TensorSpec:
    """Return the output with a step's new rows ``[B, Hkv, S, Dh]`` of a state."""
    batch, heads, _, head_dim = state.shape
    return replace(state, name=f"{state.name}_appended", shape=(batch, heads, "sequence", head_dim))


@dataclass(frozen=True)
class Contract:
    """The inputs, outputs and in-place states of a component.

    ``taps`` are intermediate tensors in order of execution, named after the module that computes
    them; only a debug build returns them.
    """

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    taps: tuple[TensorSpec, ...] = ()

    def with_taps(self) -> Contract:
        """Return the contract of a debug build, whose taps are outputs as well."""
        return replace(self, outputs=self.outputs + self.taps)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Contract:
        """Build a contract from its JSON object, which the schema has checked."""

        def specs(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(row["name"], row["dtype"], tuple(row["shape"]), row["meaning"]) for row in rows
            )

        roles = ("inputs", "outputs", "states", "taps")
        return cls(raw["component"], *(specs(raw.get(role, ())) for role in roles))


FLOATS = ("float16", "float32")
STATES = (*FLOATS, "int8", "uint8")
Shapes = dict[str, tuple[Dim, ...]]


def check_contracts(model: Mapping[str, Any], contracts: Mapping[str, Contract]) -> None:
    """Compare the contracts of a precision with the model's sizes.

    Args:
        model: the config in a manifest: ``vision``, ``decoder``.
        contracts: component → contract.

    Raises:
        ValueError: a tensor has another shape or dtype than the model's sizes require.
        KeyError: a size or a component is missing.
        TypeError: a size is not a number.
    """
    vision, decoder = model["vision"], model["decoder"]
    siglip, sam = vision["siglip"], vision["sam"]
    side, tokens = (sam or siglip)["image_size"], (siglip["image_size"] // siglip["patch_size"]) ** 2
    features: Shapes = {"low_features": ("batch", tokens, siglip["width"])}
    if sam:
        features["high_features"] = ("batch", tokens, sam["downsample_widths"][-1])
    width, state = decoder["width"], ("batch", decoder["kv_heads"], "capacity", decoder["head_dim"])
    decoder_inputs: Shapes = {
        "inputs_embeds": ("batch", "sequence", width), "positions": ("batch", "sequence"),
        "logit_rows": ("rows",),
    }  # fmt: skip
    names = [f"{kind}_cache_{layer}" for layer in range(decoder["layers"]) for kind in ("key", "value")]
    expected: dict[str, tuple[Shapes, Shapes, Shapes]] = {
        "vision_encoder": ({"pixel_values": ("batch", 3, side, side)}, features, {}),
        "adaptor": (features, {"image_embeds": ("batch", tokens, width)}, {}),
        "decoder": (
            decoder_inputs, {"logits": ("batch", "rows", decoder["vocab_size"])}, dict.fromkeys(names, state),
        ),
    }  # fmt: skip
    boundary = contracts["decoder"].inputs[0].dtype  # of the tensors between components
    dtypes = {"positions": "int64", "logit_rows": "int64", "logits": "float32"}
    for component, shapes_by_role in expected.items():
        contract = contracts[component]
        if contract.component != component:
            raise ValueError(f"the contract of the {component} is that of the {contract.component}")
        for specs, shapes in zip(
            (contract.inputs, contract.outputs, contract.states), shapes_by_role, strict=True
        ):
            actual = {spec.name: spec.shape for spec in specs}
            if actual != shapes or len(actual) != len(specs):
                raise ValueError(f"the {component} has {actual}, the model's sizes require {shapes}")
        for spec in (*contract.inputs, *contract.outputs):
            expected_dtype = dtypes.get(spec.name, boundary)
            if spec.dtype != expected_dtype or boundary not in FLOATS:
                raise ValueError(f"{spec.name} of the {component} has the dtype {spec.dtype!r}")
        state_dtypes = {spec.dtype for spec in contract.states}
        if len(state_dtypes) > 1 or state_dtypes - set(STATES):
            raise ValueError(f"the KV cache has the dtypes {', '.join(sorted(state_dtypes))}")
