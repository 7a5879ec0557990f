"""What the commands show: progress bars, tables, sentences. All of it goes to stderr but results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsvl_export.ladder import ParityResult
from runtimes.bundle import Bundle

# Where the output is no terminal, tables get room enough not to be cut.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for machines."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr that vanish when they are done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield progress


def size(count: int) -> str:
    """Bytes for people, in units of 1000."""
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parity_table(result: ParityResult) -> Table:
    """Rungs with their errors and bounds."""
    table = Table(title=f"Parity of {result.backend} {result.precision} on {result.goldens} goldens")
    for heading in ("stage", "relative RMS", "max abs", "bound", "verdict"):
        table.add_column(heading, justify="left" if heading in ("stage", "verdict") else "right")
    for rung in result.rungs:
        verdict = "[red]failed[/]" if rung.failed else "[green]passed[/]"
        if rung.name == "greedy_tokens":
            errors = ("-", "-", "equal")
        else:
            errors = (f"{rung.relative_rms:.1e}", f"{rung.max_abs:.1e}", f"{rung.tolerance:.0e}")
        table.add_row(rung.name, *errors, f"{verdict} {rung.detail.rstrip('; ')}")
    if result.task:
        task = result.task
        table.add_row(
            "task", f"{task['exact_match']:.1%}", "", "", f"{task['right']} of {task['questions']} exact"
        )
    return table


def bundle_tables(bundle: Bundle) -> list[Table]:
    """What a bundle holds."""
    manifest = bundle.manifest
    model = Table(title=escape(str(bundle.folder)), show_header=False)
    checkpoint, decoder = manifest.checkpoint, manifest.model["decoder"]
    total = size(sum(entry.bytes for entry in manifest.files.values()))
    rows = {
        "checkpoint": f"{checkpoint['name']} ({checkpoint['layout']} layout, {checkpoint['sha256'][:12]})",
        "vision": "SAM + SigLIP" if manifest.model["vision"]["sam"] else "SigLIP",
        "image": f"{manifest.preprocessing.image_size} px → {manifest.prompt.image_tokens} tokens",
        "decoder": f"{decoder['layers']} layers × {decoder['width']}, vocabulary {decoder['vocab_size']}",
        "size": f"{total} in {len(manifest.files)} files",
    }
    for key, value in rows.items():
        model.add_row(key, escape(value))
    artifacts = Table(title="Artifacts")
    for heading in ("backend", "precision", "component", "size", "parity"):
        artifacts.add_column(heading)
    for item in manifest.artifacts:
        weight = size(sum(manifest.files[path].bytes for path in item.files))
        verdict = manifest.parity.get(f"{item.backend}/{item.precision}", {}).get("verdict", "not run")
        artifacts.add_row(item.backend, item.precision, item.component, weight, verdict)
    contracts = Table(title="Contracts")
    for heading in ("component", "tensor", "dtype", "shape", "meaning"):
        contracts.add_column(heading)
    first = next(iter(manifest.contracts.values()), {})
    for contract in first.values():
        for role, specs in (("→ ", contract.inputs), ("← ", contract.outputs), ("⟳ ", contract.states[:2])):
            for spec in specs:
                shape = ", ".join(map(str, spec.shape))
                contracts.add_row(
                    contract.component,
                    role + spec.name,
                    spec.dtype,
                    f"[{shape}]".replace("[", r"\["),
                    spec.meaning,
                )
        if len(contract.states) > 2:
            contracts.add_row(contract.component, f"⟳ and {len(contract.states) - 2} more states", "", "", "")
    return [model, artifacts, contracts]
