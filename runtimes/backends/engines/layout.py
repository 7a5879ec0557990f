"""What a step of an engine needs, in plain numbers: sizes, aliases, copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from runtimes.bundle.contracts import Contract, TensorSpec, appended_state, updated_state
from runtimes.errors import UserError

PREFILL, DECODE = 0, 1  # optimization profiles of a decoder's engine, in the order they are built in
ALIGNMENT = 256  # bytes; TensorRT wants it of every address

Sizes = Mapping[str, int]  # of the contract's named dims


def tensor_shape(spec: TensorSpec, sizes: Sizes) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)


def tensor_bytes(spec: TensorSpec, sizes: Sizes) -> int:
    return prod(tensor_shape(spec, sizes)) * np.dtype(spec.dtype).itemsize


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def profile_for_tokens(tokens: int) -> int:
    """A single token is decoded, several are a prefill."""
    return DECODE if tokens == 1 else PREFILL


def buffer_bytes(specs: Sequence[TensorSpec], limits: Sequence[Sizes]) -> dict[str, int]:
    """Bytes of each tensor that hold its largest shape under any profile."""
    return {spec.name: max(tensor_bytes(spec, sizes) for sizes in limits) for spec in specs}


def aliases(contract: Contract, outputs: Mapping[str, str | None]) -> dict[str, str]:
    """Outputs that are states after the step → the state whose memory they share.

    Args:
        outputs: every output of the engine, and the input that the engine says it shares memory with.

    Raises:
        UserError: the engine keeps its states in another way than this release.
    """
    found = {}
    for spec in contract.states:
        updated, appended = updated_state(spec).name, appended_state(spec).name
        if updated in outputs:
            if outputs[updated] not in (None, spec.name):
                raise UserError(
                    f"The engine's {updated} shares the memory of {outputs[updated]}; build it again."
                )
            found[updated] = spec.name
        elif appended not in outputs:
            raise UserError(f"The engine gives back no {spec.name}; build it again.")
    return found


@dataclass(frozen=True)
class RowCopy:
    """A copy of ``height`` rows of ``width`` bytes between pitched memories, in bytes."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


def append_copies(
    spec: TensorSpec, cache: int, rows: int, positions: np.ndarray, slots: int
) -> list[RowCopy]:
    """Put a step's rows ``[B, Hkv, S, Dh]`` to their places in a state ``[B, Hkv, slots, Dh]``.

    Args:
        cache, rows: addresses.
        positions: ``[B, S]``, consecutive in each row.
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
