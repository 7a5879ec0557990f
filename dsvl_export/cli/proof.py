"""Commands that judge bundles: ``parity``, ``compare`` and ``verify``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsvl_export.cli.app import app
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    Backend,
    BundleFolder,
    Device,
    Json,
    Precision,
    Ray,
    Taps,
    Task,
    Threads,
    Tolerances,
    TrustEngine,
)
from dsvl_export.terminal import say
from runtimes.errors import UserError

if TYPE_CHECKING:
    from dsvl_export.audit import Audit
    from dsvl_export.ladder import ParityResult
    from dsvl_export.ladder.against_reference import OnStep
    from runtimes.bundle import Bundle
    from runtimes.task import TaskItem

ReportFolder = Annotated[
    Optional[Path],
    typer.Option("--report", metavar="FOLDER", help="Write the report there and leave the bundle untouched."),
]


@app.command()
def parity(
    bundle: BundleFolder,
    backend: Backend = None,
    precision: Precision = None,
    task: Task = None,
    taps: Taps = False,
    live: Annotated[
        Optional[str],
        typer.Option(
            metavar="CHECKPOINT",
            help="Compute the reference from this checkpoint with PyTorch, instead of the recorded goldens.",
        ),
    ] = None,
    tolerances: Tolerances = None,
    report: ReportFolder = None,
    device: Device = None,
    threads: Threads = None,
    ray: Ray = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch reference, stage by stage; needs no PyTorch.

    Every backend and precision of the bundle is judged, or the one you name. A report (JSON and HTML)
    goes into the bundle's reports folder. Where a stage fails, the first layer that drifted is named.

    Exit code 0: all passed; 1: something differs; 3: something could not be judged here.
    """
    from dsvl_export import display
    from dsvl_export.cluster import ray_cluster
    from dsvl_export.ladder import parity as run_parity
    from dsvl_export.ladder.tolerances import load_tolerances
    from runtimes.bundle import Bundle
    from runtimes.engines.trust import trust_engines

    opened = Bundle.open(bundle)
    if trust_engine:
        trust_engines(opened)
    opened.select(backend, precision)  # says what there is where nothing fits
    pairs = opened.matching(backend, precision)
    items, table = _task_items(task, opened), load_tolerances(tolerances)

    def run(opened: Bundle, on_step: OnStep) -> ParityResult:
        return run_parity(
            opened,
            *pair,
            task=items,
            taps=taps,
            live=live,
            tolerances=table,
            threads=threads,
            device=device,
            on_step=on_step,
            spread=spread,
        )

    results = []
    with ray_cluster(ray) as spread:
        for pair in pairs:
            warn_of_memory(opened, *pair, device)
            results.append(judge(bundle, " ".join(pair), run, report))
            if not as_json:
                display.print_parity(results[-1][1])
    if as_json:
        display.print_json([document for document, _ in results])
    leave_with([result for _, result in results])


@app.command()
def compare(
    bundle_a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="Takes the reference's place.")],
    bundle_b: Annotated[Path, typer.Argument(metavar="BUNDLE_B", help="Is compared with it.")],
    backend_a: Annotated[Optional[str], typer.Option(help="Backend of A; default: its first.")] = None,
    precision_a: Annotated[Optional[str], typer.Option(help="Precision of A; default: its first.")] = None,
    backend_b: Annotated[Optional[str], typer.Option(help="Backend of B; default: its first.")] = None,
    precision_b: Annotated[Optional[str], typer.Option(help="Precision of B; default: its first.")] = None,
    task: Task = None,
    taps: Taps = False,
    tolerances: Tolerances = None,
    report: Annotated[
        Optional[Path], typer.Option("--report", metavar="FOLDER", help="Write compare.json and .html there.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare two bundles, or two precisions of one, on the same ladder as 'parity'.

    The bounds are the sum of both precisions'. Exit codes as for 'parity'.

    Example: dsvl-export compare old-bundle new-bundle --precision-a fp16 --precision-b fp16
    """
    from dsvl_export import display
    from dsvl_export.ladder import compare as run_compare
    from dsvl_export.ladder.tolerances import load_tolerances
    from dsvl_export.records import write_report
    from dsvl_export.report.document import make_document
    from runtimes.bundle import Bundle

    first, second = Bundle.open(bundle_a), Bundle.open(bundle_b)
    pairs = (first.select(backend_a, precision_a), second.select(backend_b, precision_b))
    items, table = _task_items(task, first), load_tolerances(tolerances)
    with display.step_bar("compare") as on_step:
        result = run_compare(
            first, second, *pairs, task=items, taps=taps, tolerances=table, threads=threads, on_step=on_step
        )
    if report:
        images = first.folder / "goldens" / "images"
        _announce(write_report(second, result, report, "compare", images))
    if as_json:
        display.print_json(make_document(second, result))
    else:
        display.print_parity(result)
    leave_with([result])


@app.command()
def verify(
    bundle: BundleFolder,
    weights: Annotated[
        Optional[str],
        typer.Option(
            metavar="CHECKPOINT",
            help="Also compare every weight, constant and setting in the files with what this checkpoint and"
            " the precision plans make of them. Needs PyTorch.",
        ),
    ] = None,
    backend: Annotated[
        Optional[str], typer.Option(help="With --weights: this backend alone. Default: all.")
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="With --weights: this precision alone. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check size and SHA-256 of every file of a bundle, and that its engines are for this machine's GPU.

    With --weights, the content is checked too: exit code 1 says that something differs from the checkpoint, 3
    that a file could not be audited.

    Example: dsvl-export verify tiny-bundle --weights tiny
    """
    from dsvl_export import display
    from runtimes.bundle import Bundle
    from runtimes.engines.backend import foreign_engines

    if weights is None and (backend or precision):
        raise UserError("--backend and --precision choose what is audited; give --weights CHECKPOINT too.")
    opened = Bundle.open(bundle)
    problems = opened.problems() + foreign_engines(opened)
    report: dict[str, Any] = {
        "bundle": str(bundle), "files": len(opened.manifest.files), "problems": problems,
    }  # fmt: skip
    if problems:
        if as_json:
            display.print_json(report)
        raise UserError(f"The bundle {bundle} cannot be used as it is: {'; '.join(problems)}.")
    result = _audit(opened, weights, backend, precision) if weights else None
    if as_json:
        display.print_json({**report, **({"audit": result.to_dict()} if result else {})})
    else:
        say(f"All {len(opened.manifest.files)} files of {bundle} are as exported.")
        if result:
            display.print_audit(result)
    if result and result.exit_code:
        raise typer.Exit(result.exit_code)


def _audit(bundle: Bundle, checkpoint: str, backend: str | None, precision: str | None) -> Audit:
    from dsvl_export import display
    from dsvl_export.audit import audit
    from reference.checkpoint import open_checkpoint

    source, done = open_checkpoint(checkpoint), 0
    with display.step_bar("audit") as on_step:

        def on_bytes(part: str, count: int) -> None:
            nonlocal done
            done += count
            on_step(part, min(done, total), total)

        total = sum(entry.bytes for entry in bundle.manifest.files.values())
        on_step("hash of the checkpoint", 0, total)
        return audit(bundle, source, backend, precision, on_bytes)


def judge(
    folder: Path, label: str, run: Callable[[Bundle, OnStep], ParityResult], report: Path | None = None
) -> tuple[dict[str, Any], ParityResult]:
    """Run the ladder with a progress bar and keep the verdict in the bundle.

    Args:
        report: folder for the report; the bundle is left untouched then.

    Returns:
        The report's document and the result.
    """
    from dsvl_export import display
    from dsvl_export.records import record_verdict, write_report
    from dsvl_export.report.document import make_document
    from runtimes.bundle import Bundle

    opened = Bundle.open(folder)
    with display.step_bar(label) as on_step:
        result = run(opened, on_step)
    if report:
        name = f"parity-{result.backend}-{result.precision}"
        _announce(write_report(opened, result, report, name, opened.folder / "goldens" / "images"))
    else:
        try:
            _announce(record_verdict(opened, result))
        except (OSError, UserError) as error:  # a read-only bundle, or an export that is changing it
            say(f"The verdict was not kept in the bundle: {error}", stream=sys.stderr)
    return make_document(opened, result), result


def _announce(report: Path) -> None:
    hint = "" if report.suffix == ".html" else " (pip install 'dsvl-export[report]' adds the HTML page)"
    say(f"Report: {report}{hint}", stream=sys.stderr)


def leave_with(results: list[ParityResult]) -> None:
    """End with the exit code of the worst verdict, where it is not a pass."""
    codes = {result.exit_code for result in results}
    for code in (1, 3):
        if code in codes:
            raise typer.Exit(code)


def _task_items(task: str | None, bundle: Bundle) -> list[TaskItem] | None:
    """The questions asked for; those of the tiny model where nothing is said about its bundle."""
    from reference.tiny import HELDOUT, TINY_DIGEST
    from runtimes.task import load_task

    tiny = bundle.manifest.checkpoint["sha256"] == TINY_DIGEST
    if task == "none" or (task is None and not tiny):
        return None
    if task not in (None, "heldout"):
        return load_task(Path(task))
    items = load_task(HELDOUT)
    # The recorded answers are those of the bundled weights alone.
    return items if tiny else [replace(item, reference=None, reference_tokens=None) for item in items]
