"""Memory layout of an engine's tensors: sizes, aliases, copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from runtimes.bundle.contracts import Contract, TensorSpec, appended_state, updated_state
from runtimes.errors import UserError

PREFILL, DECODE = 0, 1  # optimization profiles of a decoder's engine, in build order
ALIGNMENT = 256  # bytes; TensorRT requires it for every address

Sizes = Mapping[str, int]  # named dim of the contract → size


def tensor_bytes(spec: TensorSpec, sizes: Sizes) -> int:
    """Return the bytes of a tensor."""
    return prod(spec.sized(sizes)) * np.dtype(spec.dtype).itemsize


def align(size: int) -> int:
    """Round a number of bytes up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def profile_for_tokens(tokens: int) -> int:
    """Return the profile for a number of tokens: ``DECODE`` for one, else ``PREFILL``."""
    return DECODE if tokens == 1 else PREFILL


def buffer_bytes(specs: Sequence[TensorSpec], limits: Sequence[Sizes]) -> dict[str, int]:
    """Return the bytes of each tensor's largest shape under any profile."""
    return {spec.name: max(tensor_bytes(spec, sizes) for sizes in limits) for spec in specs}


def aliases(contract: Contract, outputs: Mapping[str, str | None]) -> dict[str, str]:
    """Map outputs that are updated states to the state whose memory they share.

    Args:
        contract: the decoder's contract.
        outputs: outputs of the engine, each with the input that it shares memory with, if any.

    Raises:
        UserError: the engine handles its states differently from this release.
    """
    shared = {}
    for spec in contract.states:
        updated, appended = updated_state(spec).name, appended_state(spec).name
        if updated in outputs:
            if outputs[updated] not in (None, spec.name):
                raise UserError(
                    f"The engine's {updated} shares the memory of {outputs[updated]}; build it again."
                )
            shared[updated] = spec.name
        elif appended not in outputs:
            raise UserError(f"The engine does not return the state {spec.name}; build it again.")
    return shared


@dataclass(frozen=True)
class RowCopy:
    """A copy between pitched memories.

    Args:
        target: address of the first target row.
        target_pitch: bytes from one target row to the next.
        source: address of the first source row.
        source_pitch: bytes from one source row to the next.
        width: bytes of a row.
        height: number of rows.
    """

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


def append_copies(
    spec: TensorSpec, cache: int, rows: int, positions: np.ndarray, slots: int
) -> list[RowCopy]:
    """Plan the copies of a step's rows ``[B, Hkv, S, Dh]`` into a state ``[B, Hkv, slots, Dh]``.

    Args:
        spec: the state.
        cache: address of the state.
        rows: address of the rows.
        positions: ``[B, S]``, consecutive in each row.
        slots: tokens per row of the state.
    """
    _, heads, _, head_dim = spec.shape
    token = int(head_dim) * np.dtype(spec.dtype).itemsize
    batch, length = positions.shape
    pitch, width = slots * token, length * token
    return [
        RowCopy(
            cache + row * int(heads) * pitch + int(positions[row, 0]) * token,
            pitch,
            rows + row * int(heads) * width,
            width,
            width,
            int(heads),
        )
        for row in range(batch)
    ]
