"""Contracts: what each component takes, gives and keeps, in one object that everyone reads.

The compiler checks its artifact against the contract, the session binds by it, the tests
compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtimes.errors import UserError

Dim = int | str  # a size, or the name of a size that is known only at run time


def updated_state(name: str) -> str:
    """Name of the output that carries a state after the step, bound to the state's own memory."""
    return f"{name}_updated"


COMPONENTS = ("vision_encoder", "adaptor", "token_embedding", "decoder")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (numpy's name), shape and meaning of one tensor."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str

    def check(self, array: np.ndarray) -> None:
        """Raise ValueError where an array does not fit; named dims accept any size."""
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(self.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np.dtype(self.dtype):
            raise ValueError(
                f"{self.name} must be {self.dtype}{list(self.shape)}, got {array.dtype}{list(array.shape)}"
            )


@dataclass(frozen=True)
class Contract:
    """Inputs, outputs and in-place states of one component."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Contract:
        """Inverse of ``to_dict``; raises UserError on a malformed object."""

        def specs(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(row["name"], row["dtype"], tuple(row["shape"]), row["meaning"]) for row in rows
            )

        try:
            return cls(raw["component"], specs(raw["inputs"]), specs(raw["outputs"]), specs(raw["states"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"The manifest holds a contract that cannot be read: {error}.") from error
