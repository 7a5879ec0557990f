"""An ``.aimodel`` from a traced component: an entry point for each size, all with the same weights."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import torch

from dsvl_export.aten_program import fixed_program
from dsvl_export.coreai_program.lower import BOUNDARIES, TABLE, coreai_torch
from dsvl_export.lowering import LoadParameter
from reference.trace import TracedComponent
from runtimes.coreai import CHUNK, PREFILL, SIZES, SUFFIX
from runtimes.errors import UserError
from runtimes.fixed import DECODE, MAIN


def entry_points(traced: TracedComponent, capacity: int) -> dict[str, dict[str, int]]:
    """Sizes of the contract's named dims for each entry point."""
    if not traced.contract.states:
        return {MAIN: {"batch": 1}}
    sizes = {DECODE: 1, PREFILL: min(CHUNK, capacity)}
    return {
        name: {"batch": 1, "sequence": length, "rows": 1, "capacity": capacity}
        for name, length in sizes.items()
    }


def write_asset(folder: Path, traced: TracedComponent, load: LoadParameter, capacity: int) -> Path:
    """Convert into ``<component>.aimodel``.

    Raises:
        UserError: Core AI's converter refuses the program.
    """
    contract = traced.contract
    loaded: dict[str, torch.Tensor] = {}

    def load_once(name: str) -> torch.Tensor:
        if name not in loaded:
            loaded[name] = load(name)
        return loaded[name]

    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    asset = folder / f"{contract.component}{SUFFIX}"
    with _quiet():
        points = entry_points(traced, capacity)
        for name, sizes in points.items():
            program = fixed_program(traced, load_once, sizes, "Core AI", TABLE, BOUNDARIES)
            try:
                converter.add_exported_program(
                    program.run_decompositions(coreai_torch.get_decomp_table()),
                    input_names=[spec.name for spec in contract.inputs],
                    output_names=[spec.name for spec in contract.outputs],
                    state_names=[spec.name for spec in contract.states],
                    entrypoint_name=name,
                )
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"Core AI cannot convert the {contract.component}: {_line(error)}."
                ) from error
        converter.to_coreai().save_asset(asset)
    (asset / SIZES).write_text(json.dumps(points), encoding="utf-8")
    return asset


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _quiet(contextlib.ExitStack):
    """The converter's warnings and progress bars are not for our users."""

    def __enter__(self) -> _quiet:
        super().__enter__()
        self.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        self.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return self
