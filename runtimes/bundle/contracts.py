"""Contracts: what each component takes, gives and keeps, in one object that everyone reads.

The compiler checks its artifact against the contract, the session binds by it, the tests
compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Dim = int | str  # a size, or the name of a size that is known only at run time


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (numpy's name), shape and meaning of one tensor."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str

    def allocate(self, sizes: Mapping[str, int]) -> np.ndarray:
        """Zeros of this dtype and shape; ``sizes`` gives the named dims."""
        return np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in self.shape], self.dtype)

    def check(self, array: np.ndarray) -> None:
        """Raise ValueError where an array does not fit; named dims accept any size."""
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(self.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np.dtype(self.dtype):
            raise ValueError(
                f"{self.name} must be {self.dtype}{list(self.shape)}, got {array.dtype}{list(array.shape)}"
            )


def updated_state(state: TensorSpec) -> TensorSpec:
    """The output that carries a state after the step, bound to the state's own memory."""
    return replace(state, name=f"{state.name}_updated")


def appended_state(state: TensorSpec) -> TensorSpec:
    """The output with a step's own rows ``[B, Hkv, S, Dh]``, which the session writes into the state."""
    batch, heads, _, head_dim = state.shape
    return replace(state, name=f"{state.name}_appended", shape=(batch, heads, "sequence", head_dim))


@dataclass(frozen=True)
class Contract:
    """Inputs, outputs and in-place states of one component.

    ``taps`` are inner tensors in order of execution, named after the part of the model that made
    them; only a debug build gives them.
    """

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    taps: tuple[TensorSpec, ...] = ()

    def with_taps(self) -> Contract:
        """The contract of a debug build: its taps are outputs as well."""
        return replace(self, outputs=self.outputs + self.taps)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Contract:
        """Of the object in a manifest, which its schema has checked."""

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

    Raises:
        ValueError: names the tensors that do not fit; KeyError and TypeError where a size is missing.
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
    border = contracts["decoder"].inputs[0].dtype
    dtypes = {"positions": "int64", "logit_rows": "int64", "logits": "float32"}
    for component, wanted in expected.items():
        contract = contracts[component]
        if contract.component != component:
            raise ValueError(f"the contract of the {component} is that of the {contract.component}")
        for specs, shapes in zip((contract.inputs, contract.outputs, contract.states), wanted, strict=True):
            found = {spec.name: spec.shape for spec in specs}
            if found != shapes or len(found) != len(specs):
                raise ValueError(f"the {component} has {found}, the model's sizes ask for {shapes}")
        for spec in (*contract.inputs, *contract.outputs):
            wanted_dtype = dtypes.get(spec.name, border)
            if spec.dtype != wanted_dtype or border not in FLOATS:
                raise ValueError(f"{spec.name} of the {component} has the dtype {spec.dtype!r}")
        kept = {spec.dtype for spec in contract.states}
        if len(kept) > 1 or kept - set(STATES):
            raise ValueError(f"the KV cache has the dtypes {', '.join(sorted(kept))}")
