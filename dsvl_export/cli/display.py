"""What the commands show: progress bars, tables, sentences. All of it goes to stderr but results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dsvl_export.cli.terminal import json_text, without_controls
from dsvl_export.parity_check import ParityResult, Rung
from runtimes.bundle.bundle import Bundle
from runtimes.units import size

if TYPE_CHECKING:
    from dsvl_export.audit import Audit


class SafeConsole(Console):
    """A console that prints no control characters but its own: all texts and cells come through here.

    Markup is the caller's; texts of files that are put into it are escaped with ``escape``.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(without_controls(text), **options)


# Where the output is no terminal, tables get room enough not to be cut.
out = SafeConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = SafeConsole(stderr=True, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Markup that shows a text of a stranger as it is; for progress bars, which render for themselves."""
    return escape(without_controls(text))


def print_json(value: Any) -> None:
    """One JSON document on stdout, for machines."""
    print(json_text(value, indent=2))


class AmountColumn(ProgressColumn):
    """How much of how much, for tasks whose field ``in_bytes`` is set."""

    def render(self, task: Task) -> Text:
        known = task.fields.get("in_bytes") and task.total
        return Text(f"{size(int(task.completed))} of {size(int(task.total or 0))}" if known else "")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr that vanish when they are done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        AmountColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield progress


@contextmanager
def step_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for the steps of the ladder: yields its ``on_step``."""
    with progress_bar() as bars:
        bar = bars.add_task(plain(label))

        def on_step(name: str, done: int, total: int) -> None:
            bars.update(bar, description=plain(f"{label}: {name}"), completed=done, total=total)

        yield on_step


COLOURS = {"passed": "green", "failed": "red"}  # all other states are yellow: nothing was proven


def print_parity(result: ParityResult, console: Console = out) -> None:
    """The table of rungs, then what needs a sentence: drift, and why nothing was judged."""
    console.print(parity_table(result))
    for drift in result.drift:
        if drift.first or result.verdict == "failed":
            console.print(f"Drift in the {escape(str(drift))}")


def parity_table(result: ParityResult) -> Table:
    """Rungs with their errors and bounds."""
    colour = COLOURS.get(result.verdict, "yellow")
    pair = escape(f"{result.backend} {result.precision}")
    title = f"{pair} on {result.goldens} goldens: [{colour}]{result.verdict}[/]"
    table = Table(title=f"Parity of {title} ({escape(str(result.execution))})")
    table.caption = f"compared with {escape(result.reference)}"
    if result.overridden:
        table.caption += ", tolerances overridden"
    if result.left_out:
        table.caption += f"; {result.left_out} more do not fit into the decoder's KV cache"
    for heading in ("stage", "relative RMS", "bound", "SNR", "max abs", "verdict"):
        table.add_column(heading, justify="left" if heading in ("stage", "verdict") else "right")
    for rung in result.rungs:
        if rung.errors:
            errors = rung.errors
            signal = "∞" if errors.relative_rms == 0 else f"{errors.snr_db:.0f} dB"
            numbers = [f"{errors.relative_rms:.1e}", f"{errors.bound:.0e}", signal, f"{errors.max_abs:.1e}"]
        elif rung.name == "task_accuracy" and result.task:
            numbers = [f"{result.task.exact_match:.1%} exact", "", "", ""]
        else:
            numbers = ["", "equal" if rung.name in ("text", "greedy_tokens") else "", "", ""]
        state = f"[{COLOURS.get(rung.state, 'yellow')}]{rung.state}[/]"
        remarks = [remark for remark in (rung.detail, _widened(rung, result)) if remark]
        table.add_row(
            rung.name, *numbers, ": ".join([state, *([escape("; ".join(remarks))] if remarks else [])])
        )
    return table


def print_audit(result: Audit, console: Console = out) -> None:
    """A row for each part of the bundle; what differs, or why it was not audited, is said below."""
    colour = COLOURS.get(result.verdict, "yellow")
    table = Table(title=f"Audit against {escape(result.checkpoint)}: [{colour}]{result.verdict}[/]")
    for heading in ("part", "compared", "verdict"):
        table.add_column(heading)
    for part in result.parts:
        state = f"[{COLOURS.get(part.state, 'yellow')}]{part.state}[/]"
        table.add_row(escape(part.name), part.compared, state)
    console.print(table)
    for part in result.parts:
        for difference in part.differences:
            console.print(f"{escape(part.name)} differs: {escape(str(difference))}")
        if part.more:
            console.print(f"{escape(part.name)} differs in {part.more} more places")
        if part.reason:
            console.print(f"{escape(part.name)}: not audited: {escape(part.reason)}")


def _widened(rung: Rung, result: ParityResult) -> str:
    """Why a bound is wider than the precision's usual one."""
    errors = rung.errors
    if (
        errors is None
        or errors.noise is None
        or errors.golden < 0
        or errors.bound <= result.bound(rung.name, None)
    ):
        return ""
    return f"the precision itself costs the reference {errors.noise:.1e} on {errors.where}"


def describe_verdict(kept: Mapping[str, Any]) -> str:
    """A verdict of a manifest with what restricts it: ``passed (simulated by ...)``.

    A bare ``passed`` is for what ran on the target's own runtime within the shipped tolerances.
    """
    verdict = str(kept.get("verdict", "not run"))
    if verdict not in ("passed", "failed"):
        return verdict
    execution = str(kept.get("execution", "on what is not recorded"))
    remarks = [] if execution.startswith("ran on ") else [execution]
    if kept.get("tolerances", "shipped") != "shipped":
        remarks.append("with other tolerances than the shipped ones")
    return f"{verdict} ({', '.join(remarks)})" if remarks else verdict


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
    for heading in ("backend", "precision", "component", "size", "audit", "parity"):
        artifacts.add_column(heading)
    for item in manifest.artifacts:
        weight = size(sum(manifest.files[path].bytes for path in item.files))
        verdict = describe_verdict(manifest.parity.get(f"{item.backend}/{item.precision}", {}))
        cells = (
            item.backend,
            item.precision,
            item.component,
            weight,
            "passed" if item.audited else "not run",
            verdict,
        )
        artifacts.add_row(*map(escape, cells))
    contracts = Table(title="Contracts")
    for heading in ("component", "tensor", "dtype", "shape", "meaning"):
        contracts.add_column(heading)
    first = next(iter(manifest.contracts.values()), {})
    for contract in first.values():
        for role, specs in (("→ ", contract.inputs), ("← ", contract.outputs), ("⟳ ", contract.states[:2])):
            for spec in specs:
                shape = ", ".join(map(str, spec.shape))
                row = (contract.component, role + spec.name, spec.dtype, f"[{shape}]", spec.meaning)
                contracts.add_row(*map(escape, row))
        if len(contract.states) > 2:
            contracts.add_row(
                escape(contract.component), f"⟳ and {len(contract.states) - 2} more states", "", "", ""
            )
    return [model, artifacts, contracts]
