"""What ``doctor``, ``targets`` and ``plan`` show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from dsvl_export.defects import Defect
from dsvl_export.display import out, size
from dsvl_export.planner.plan import GIGA, Plan
from dsvl_export.planner.targets import Target


def print_diagnosis(found: dict[str, Any]) -> None:
    """Backends, then what is broken, then the known defects of what is installed."""
    machine = found["machine"]
    out.print(
        escape(
            f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])} of memory"
            f" ({size(machine['available_bytes'])} free), {machine['system']}, Python {machine['python']}"
        )
    )
    out.print(escape(", ".join(f"{name} {version}" for name, version in found["packages"].items())))
    table = Table(title="Backends here")
    for heading in ("backend", "compile", "run"):
        table.add_column(heading)
    for name, backend in found["backends"].items():
        compiles, runs = backend["compile"], backend["run"]
        table.add_row(
            name,
            f"[green]yes[/]: {', '.join(compiles['precisions'])}" if compiles["able"] else _no(compiles),
            f"[green]yes[/]: {', '.join(runs['devices'])}" if runs["able"] else _no(runs),
        )
    out.print(table)
    for row in found["broken_pairs"]:
        out.print(f"[red]Broken:[/] {escape(row['what'])} {escape(row['do'])} {escape(row['link'] or '')}")
    for row in found["defects"]:
        remedy = f"handled: {row['handled']}" if row["handled"] else row["do"]
        out.print(
            f"[yellow]Known defect:[/] {escape(row['what'])} {escape(remedy)} {escape(row['link'] or '')}"
        )
    out.print("[green]All well.[/]" if found["healthy"] else "[red]Not fit for work; see above.[/]")


def _no(found: dict[str, Any]) -> str:
    return f"[red]no[/]: {escape(found['missing'])}"


def target_table(targets: dict[str, Target]) -> Table:
    table = Table(title="Targets")
    for heading in (
        "target",
        "device",
        "memory",
        "bandwidth",
        "peak",
        "SM",
        "backends and precisions",
        "runtime",
    ):
        table.add_column(heading)
    for name, target in targets.items():
        peak = "\n".join(f"{precision} {tops:g}" for precision, tops in target.tops.items())
        backends = "\n".join(f"{backend}: {' '.join(kinds)}" for backend, kinds in target.backends.items())
        table.add_row(
            name, target.device,
            f"{target.memory_gb:g} GB\n{target.usable_gb:g} usable" if target.memory_gb else "measured",
            f"{target.bandwidth_gbs:g} GB/s" if target.bandwidth_gbs else "measured",
            peak or "measured", str(target.sm or ""), backends, target.runtime,
        )  # fmt: skip
    table.caption = "Peak: dense 10^12 operations per second. Sources and notes: dsvl-export targets --json"
    return table


def print_plan(plan: Plan, exportable: bool, nearest: str | None, defects: Sequence[Defect]) -> None:
    """The prediction, whether it fits, and what to know about it."""
    request, target = plan.request, plan.target
    what = f"{request.precision} with {request.backend} on {target.device}, context {request.context}"
    table = Table(title=escape(what), show_header=False)
    stored = size(plan.artifact_bytes) + ("" if plan.exact else " (estimate)")
    rows = {
        "artifacts": f"{stored}, and {size(plan.embedding_bytes)} of token embeddings",
        "memory: weights": size(plan.weight_bytes),
        "memory: KV cache": f"{size(plan.kv_bytes)} for {request.context} tokens",
        "memory: activations": size(plan.activation_bytes),
        "memory: runtime": size(plan.runtime_bytes),
        "memory: peak": f"[bold]{size(plan.peak_bytes)}[/] of {size(round(target.usable_gb * GIGA))} usable",
        "fits": _fit(plan, nearest),
        "time to first token": f"at least {plan.first_token_seconds:.3g} s for {plan.prompt_tokens} tokens"
        f" (vision {plan.vision_seconds:.2g} s, prefill {plan.prefill_seconds:.2g} s)",
        "decode": f"at most {plan.tokens_per_second:.3g} tokens per second at {request.context} tokens",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    if not exportable:
        out.print(f"This release cannot export {request.precision} for {request.backend} yet.")
    for defect in defects:
        out.print(f"[yellow]Known defect:[/] {escape(str(defect))}")


def _fit(plan: Plan, nearest: str | None) -> str:
    if plan.fits:
        return f"[green]yes[/], up to a context of {plan.largest_context}"
    context = f"the largest context that fits is {plan.largest_context}"
    smaller = f"{nearest} fits" if nearest else "no smaller precision fits either"
    return f"[red]no[/]: {context if plan.largest_context else 'not even the weights do'}; {smaller}"
