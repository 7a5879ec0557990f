"""The output of ``doctor``, ``targets`` and ``plan``, and of ``export --backend auto``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsvl_export.cli.display import out
from dsvl_export.targets.defects import Defect
from dsvl_export.targets.targets import Target
from runtimes.backends.onnxruntime_releases import release_for_precision
from runtimes.bundle.mixes import COMPONENTS, MIXED
from runtimes.units import size

if TYPE_CHECKING:
    from dsvl_export.exporter.fastest import Fastest
    from dsvl_export.planning.plan import Plan


def print_diagnosis(diagnosis: dict[str, Any]) -> None:
    """Print the backends, then incompatible versions, then known defects."""
    machine = diagnosis["machine"]
    out.print(
        escape(
            f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])} of memory"
            f" ({size(machine['available_bytes'])} free), {machine['system']}, Python {machine['python']}"
        )
    )
    out.print(escape(", ".join(f"{name} {version}" for name, version in diagnosis["packages"].items())))
    table = Table(title="Backends here")
    for heading in ("backend", "compile", "run"):
        table.add_column(heading)
    for name, backend in diagnosis["backends"].items():
        compiles, runs = backend["compile"], backend["run"]
        table.add_row(
            name,
            f"[green]yes[/]: {', '.join(compiles['precisions'])}" if compiles["able"] else _no(compiles),
            f"[green]yes[/]: {', '.join(runs['devices'])}{_too_old(runs)}" if runs["able"] else _no(runs),
        )
    out.print(table)
    for row in diagnosis["broken_pairs"]:
        out.print(f"[red]Broken:[/] {escape(row['what'])} {escape(row['do'])} {escape(row['link'] or '')}")
    for row in diagnosis["defects"]:
        if not row["handled"]:
            remedy = f"{row['what']} {row['do']} {row['link'] or ''}"
            out.print(f"[yellow]Known defect:[/] {escape(remedy)}")
    out.print(
        "[green]This machine is ready.[/]"
        if diagnosis["healthy"]
        else "[red]This machine is not ready; see above.[/]"
    )
    for row in diagnosis["defects"]:
        if row["handled"]:
            remedy = f"{row['what']} {row['handled']} {row['link'] or ''}"
            out.print(f"[dim]Handled defect: {escape(remedy)}[/]")


def _too_old(runs: dict[str, Any]) -> str:
    """Return the precisions that the installed release cannot run."""
    if not runs.get("too_old_for"):
        return ""
    needs = ", ".join(f"{name} needs {runs['needs'][name]}" for name in runs["too_old_for"])
    return f"; [yellow]{needs}; installed: {escape(runs['release'])}[/]"


def _no(row: dict[str, Any]) -> str:
    """Return what is missing."""
    return f"[red]no[/]: {escape(row['missing'])}"


def target_table(targets: dict[str, Target]) -> Table:
    """Return the table of target devices."""
    table = Table(title="Targets")
    table.add_column("target", no_wrap=True)
    for heading in ("device", "memory", "bandwidth", "peak", "backends and precisions"):
        table.add_column(heading)
    for name, target in targets.items():
        peak = "\n".join(f"{precision} {tops:g}" for precision, tops in target.tops.items())
        backends = "\n".join(f"{backend}: {' '.join(kinds)}" for backend, kinds in target.backends.items())
        table.add_row(
            name,
            f"{target.device}\n[dim]{escape(target.runtime)}[/]",
            f"{target.memory_gb:g} GB\n{target.usable_gb:g} usable" if target.memory_gb else "measured",
            f"{target.bandwidth_gbs:g} GB/s" if target.bandwidth_gbs else "measured",
            peak or "measured",
            backends,
        )
    table.caption = "Peak: dense 10^12 operations per second. Sources and notes: dsvl-export targets --json"
    return table


def print_plan(plan: Plan, nearest: str | None, defects: Sequence[Defect]) -> None:
    """Print the prediction, whether it fits, and the known defects."""
    request, target = plan.request, plan.target
    pair = f"{request.precision} with {request.backend}"
    if request.backend == MIXED:
        pair = f"the mix {request.precision}"
    what = f"{pair} on {target.device}, context {request.context}"
    table = Table(title=escape(what), show_header=False)
    stored = size(plan.artifact_bytes) + ("" if plan.exact else " (estimate)")
    rows = {
        "artifacts": f"{stored}, and {size(plan.embedding_bytes)} of token embeddings",
        "memory: weights": size(plan.weight_bytes),
        "memory: KV cache": f"{size(plan.kv_bytes)} for {request.context} tokens",
        "memory: activations": size(plan.activation_bytes),
        "memory: runtime": size(plan.runtime_bytes),
        "memory: peak": f"[bold]{size(plan.peak_bytes)}[/] of {size(plan.usable_bytes)} usable",
        "fits": _fit(plan, nearest),
        "time to first token": f"at least {_time(plan.first_token_seconds)} for {plan.prompt_tokens} tokens"
        f" (vision {_time(plan.vision_seconds)}, prefill {_time(plan.prefill_seconds)})",
        "decode": f"at most {_rate(plan.tokens_per_second)} tokens per second at {request.context} tokens",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    if not plan.exact:
        out.print(f"The size is an estimate: the packages to export to {request.backend} are not installed.")
    if request.backend == "onnxruntime" and not request.precision.endswith((".yaml", ".yml")):
        out.print(f"Needs ONNX Runtime {release_for_precision(request.precision)} or later.")
    for defect in defects:
        out.print(f"[yellow]Known defect:[/] {escape(str(defect))}")


def print_candidates(fastest: Fastest, console: Console) -> None:
    """Print the seconds of the candidates of ``--backend auto``, the chosen ones marked."""
    from dsvl_export.exporter.fastest import ANSWER_TOKENS  # deferred: imports torch

    chosen = fastest.config.components.chosen()
    how = "measured on this machine" if fastest.measured else "roofline bounds of the target"
    table = Table(title=f"Seconds for one image, and for a prompt and {ANSWER_TOKENS} tokens, {how}")
    for heading in ("backend", "precision", *COMPONENTS):
        table.add_column(heading)
    for item in fastest.candidates:
        texts = []
        for component in COMPONENTS:
            text = f"{item.seconds[component]:.4g}" if item.seconds else ""
            mark = chosen[component] == f"{item.backend}:{item.precision}"
            texts.append(f"[bold green]{text} ✓[/]" if mark else text)
        table.add_row(escape(item.backend), escape(item.precision), *texts)
    console.print(table)
    for item in fastest.candidates:
        if item.problem:
            console.print(f"Not chosen: {escape(f'{item.backend} {item.precision}: {item.problem}')}")


def _time(seconds: float) -> str:
    """Format seconds."""
    return (
        f"{seconds:.1f} s"
        if seconds >= 10
        else f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1000 * seconds:.2g} ms"
    )


def _rate(per_second: float) -> str:
    """Format a rate."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def _fit(plan: Plan, nearest: str | None) -> str:
    """Return whether the plan fits and, if it does not, what would fit."""
    if plan.fits:
        return f"[green]yes[/], up to a context of {plan.largest_context}"
    if plan.weight_bytes + plan.runtime_bytes > plan.usable_bytes:
        why = "the weights alone do not fit"
    elif plan.largest_context:
        why = f"the largest context that fits is {plan.largest_context}"
    else:
        why = f"even a context for the prompt of {plan.prompt_tokens} tokens does not fit"
    smaller = f"{nearest} fits" if nearest else "no smaller precision fits"
    return f"[red]no[/]: {why}; {smaller}"
