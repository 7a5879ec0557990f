"""Progress bars, tables and messages of the commands; results go to stdout, all else to stderr."""

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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dsvl_export.cli.terminal import json_text, without_controls
from dsvl_export.parity_check import ParityResult, StageResult
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Manifest
from runtimes.bundle.mixes import COMPONENTS, MIXED
from runtimes.units import size

if TYPE_CHECKING:
    from dsvl_export.audit import Audit
    from dsvl_export.exporter.stages import ExportProgress, Report


class SafeConsole(Console):
    """A console that escapes control characters in all texts and cells.

    Texts that come from files must be escaped with ``escape`` before they are put into markup.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text without control characters."""
        return super().render_str(without_controls(text), **options)


# Without a terminal, tables are wide enough not to be cut.
out = SafeConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = SafeConsole(stderr=True, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Escape a text from a file for a progress bar, which ``SafeConsole`` does not render."""
    return escape(without_controls(text))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json_text(value, indent=2))


class AmountColumn(ProgressColumn):
    """A column with the bytes done and all bytes, for tasks whose field ``in_bytes`` is set."""

    def render(self, task: Task) -> Text:
        """Render the bytes of a task."""
        in_bytes = task.fields.get("in_bytes") and task.total
        return Text(f"{size(int(task.completed))} of {size(int(task.total or 0))}" if in_bytes else "")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress bars on stderr that disappear when they are done."""
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
def export_progress() -> Iterator[Report]:
    """Show a progress bar for each stage of an export; yields its ``report``."""
    with progress_bar() as bars:
        tasks: dict[str, TaskID] = {}
        with_bytes: set[str] = set()

        def report(progress: ExportProgress) -> None:
            name, in_bytes = progress.stage, progress.in_bytes
            if name not in tasks:
                tasks[name] = bars.add_task(plain(name), total=None)
            if in_bytes and name not in with_bytes:  # bytes written before do not count as speed
                with_bytes.add(name)
                bars.reset(tasks[name], total=progress.total, completed=progress.done, in_bytes=True)
            bars.update(tasks[name], completed=progress.done, total=progress.total, in_bytes=in_bytes)
            if progress.state == "reused":
                bars.console.print(f"[dim]{escape(progress.stage)}: unchanged, reused[/]")

        yield report


@contextmanager
def step_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar for the steps of a command; yields its ``on_step``."""
    with progress_bar() as bars:
        bar = bars.add_task(plain(label))

        def on_step(name: str, done: int, total: int) -> None:
            bars.update(bar, description=plain(f"{label}: {name}"), completed=done, total=total)

        yield on_step


COLORS = {"passed": "green", "failed": "red"}  # all other states are yellow


def print_parity(result: ParityResult, console: Console = out) -> None:
    """Print the table of stages, then the first divergent layer of failed components."""
    console.print(parity_table(result))
    for localization in result.localizations:
        if localization.first or result.verdict == "failed":
            console.print(f"Localization in the {escape(str(localization))}")


def parity_table(result: ParityResult) -> Table:
    """Return the table of stages with their errors and bounds."""
    color = COLORS.get(result.verdict, "yellow")
    pair = escape(f"{result.backend} {result.precision}")
    title = f"{pair} on {result.goldens} goldens: [{color}]{result.verdict}[/]"
    table = Table(title=f"Parity of {title} ({escape(str(result.execution))})")
    table.caption = f"compared with {escape(result.reference)}"
    if result.overridden:
        table.caption += ", tolerances overridden"
    if result.left_out:
        table.caption += f"; {result.left_out} more do not fit into the decoder's KV cache"
    for heading in ("stage", "relative RMS", "bound", "SNR", "max abs", "verdict"):
        table.add_column(heading, justify="left" if heading in ("stage", "verdict") else "right")
    for stage in result.stages:
        if stage.errors:
            errors = stage.errors
            signal = "∞" if errors.relative_rms == 0 else f"{errors.snr_db:.0f} dB"
            numbers = [f"{errors.relative_rms:.1e}", f"{errors.bound:.0e}", signal, f"{errors.max_abs:.1e}"]
        elif stage.name == "task_accuracy" and result.task:
            numbers = [f"{result.task.exact_match:.1%} exact", "", "", ""]
        else:
            numbers = ["", "equal" if stage.name in ("text", "greedy_tokens") else "", "", ""]
        state = f"[{COLORS.get(stage.state, 'yellow')}]{stage.state}[/]"
        remarks = [remark for remark in (stage.detail, _widened(stage, result)) if remark]
        table.add_row(
            stage.name, *numbers, ": ".join([state, *([escape("; ".join(remarks))] if remarks else [])])
        )
    return table


def print_audit(result: Audit, console: Console = out) -> None:
    """Print the parts of a bundle, then their differences or why they were not audited."""
    color = COLORS.get(result.verdict, "yellow")
    table = Table(title=f"Audit against {escape(result.checkpoint)}: [{color}]{result.verdict}[/]")
    for heading in ("part", "compared", "verdict"):
        table.add_column(heading)
    for part in result.parts:
        state = f"[{COLORS.get(part.state, 'yellow')}]{part.state}[/]"
        table.add_row(escape(part.name), part.compared, state)
    console.print(table)
    for part in result.parts:
        for difference in part.differences:
            console.print(f"{escape(part.name)} differs: {escape(str(difference))}")
        if part.more:
            console.print(f"{escape(part.name)} differs in {part.more} more places")
        if part.reason:
            console.print(f"{escape(part.name)}: not audited: {escape(part.reason)}")


def _widened(stage: StageResult, result: ParityResult) -> str:
    """Return why a bound is wider than the usual one of the precision."""
    errors = stage.errors
    if (
        errors is None
        or errors.quantization_error is None
        or errors.golden < 0
        or errors.bound <= result.bound(stage.name, None)
    ):
        return ""
    return f"the reference's quantization error is {errors.quantization_error:.1e} on {errors.where}"


def describe_verdict(kept: Mapping[str, Any]) -> str:
    """Return a verdict of a manifest with its restrictions, such as ``passed (simulated by ...)``.

    ``passed`` alone means that it ran on the target's own runtime within the shipped tolerances.
    """
    verdict = str(kept.get("verdict", "not run"))
    if verdict not in ("passed", "failed"):
        return verdict
    execution = str(kept.get("execution", "execution not recorded"))
    remarks = [] if execution.startswith("ran on ") else [execution]
    if kept.get("tolerances", "shipped") != "shipped":
        remarks.append("with overridden tolerances")
    return f"{verdict} ({', '.join(remarks)})" if remarks else verdict


def bundle_tables(bundle: Bundle) -> list[Table]:
    """Return tables of the model, the artifacts and the contracts of a bundle."""
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
    for remark in checkpoint.get("remarks", []):
        model.add_row("note", escape(remark))
    artifacts = Table(title="Artifacts")
    for heading in ("backend", "precision", "component", "size", "audit", "parity"):
        artifacts.add_column(heading)
    choices = bundle.choices()
    for item in manifest.artifacts:
        weight = size(sum(manifest.files[path].bytes for path in item.files))
        pair = (item.backend, item.precision)
        verdict = describe_verdict(manifest.parity.get("/".join(pair), {})) if pair in choices else ""
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
    mixes = [_mix_table(manifest)] if manifest.mixes else []
    adapters = [_adapter_table(manifest)] if manifest.adapters else []
    return [model, artifacts, *mixes, *adapters, contracts]


def _mix_table(manifest: Manifest) -> Table:
    """Return the table of the mixes."""
    table = Table(title=f"Mixes (--backend {MIXED} --precision NAME)")
    for heading in ("name", *COMPONENTS, "parity"):
        table.add_column(heading)
    for mix in manifest.mixes:
        verdict = describe_verdict(manifest.parity.get(f"{MIXED}/{mix.name}", {}))
        table.add_row(*map(escape, (mix.name, *map(" ".join, mix.components.values()), verdict)))
    return table


def _adapter_table(manifest: Manifest) -> Table:
    """Return the table of the switchable adapters."""
    table = Table(title="Switchable adapters")
    for heading in ("name", "backend", "precision", "rank", "layers", "size", "origin"):
        table.add_column(heading)
    for item in manifest.adapters:
        weight = size(manifest.files[item.file].bytes)
        targets = ", ".join(item.targets)
        cells = (item.name, item.backend, item.precision, str(item.rank), targets, weight, item.origin)
        table.add_row(*map(escape, cells))
    return table
