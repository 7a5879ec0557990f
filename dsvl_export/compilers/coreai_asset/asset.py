"""An ``.aimodel`` from a traced component: one entry point per size, with shared weights."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from torch import Tensor

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.aten_program import fixed_program
from dsvl_export.compilers.coreai_asset.lower import BOUNDARIES, TABLE, coreai_torch
from reference.trace import TracedComponent
from runtimes.backends.coreai import CHUNK, PREFILL, SIZES, SUFFIX
from runtimes.backends.static_shape import DECODE, MAIN
from runtimes.errors import UserError, first_line


def entry_points(traced: TracedComponent, capacity: int) -> dict[str, dict[str, int]]:
    """Return the sizes of the contract's named dims for each entry point."""
    if not traced.contract.states:
        return {MAIN: {"batch": 1}}
    sizes = {DECODE: 1, PREFILL: min(CHUNK, capacity)}
    return {
        name: {"batch": 1, "sequence": length, "rows": 1, "capacity": capacity}
        for name, length in sizes.items()
    }


def write_asset(folder: Path, traced: TracedComponent, load: LoadParameter, capacity: int) -> Path:
    """Convert a component and write ``<component>.aimodel``.

    Raises:
        UserError: Core AI's converter refuses the program.
    """
    contract = traced.contract
    tensors: dict[str, Tensor] = {}  # of all entry points: quantized once, and written once
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    asset = folder / f"{contract.component}{SUFFIX}"
    with _quiet():
        points, programs = entry_points(traced, capacity), {}
        for name, sizes in points.items():
            program = fixed_program(traced, load, sizes, "Core AI", TABLE, BOUNDARIES, tensors)
            programs[name] = program.run_decompositions(coreai_torch.get_decomp_table())
        try:
            for name, program in programs.items():
                converter.add_exported_program(
                    program,
                    input_names=[spec.name for spec in contract.inputs],
                    output_names=[spec.name for spec in contract.outputs],
                    state_names=[spec.name for spec in contract.states],
                    entrypoint_name=name,
                )
            converter.to_coreai().save_asset(asset)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = first_line(error)
            raise UserError(f"Core AI cannot convert the {contract.component}: {reason}.") from error
    (asset / SIZES).write_text(json.dumps(points), encoding="utf-8")
    return asset


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the converter's warnings and progress bars, which do not concern users."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
