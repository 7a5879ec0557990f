"""The commands ``parity`` and ``compare``, which run the parity check."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import bundle_backends, bundle_precisions, values
from dsvl_export.cli.memory import warn_of_memory
from dsvl_export.cli.options import (
    CHECK,
    Adapters,
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
from dsvl_export.cli.terminal import say
from runtimes.errors import UserError

if TYPE_CHECKING:
    from dsvl_export.parity_check import ParityResult
    from dsvl_export.parity_check.against_reference import OnStep
    from runtimes.bundle.bundle import Bundle
    from runtimes.goldens.task import TaskItem

ReportFolder = Annotated[
    Optional[Path],
    typer.Option(
        "--report",
        metavar="FOLDER",
        help="Write the report to this folder and leave the bundle unchanged.",
        rich_help_panel=CHECK,
    ),
]


@command("parity")
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
            help="Compute the reference with PyTorch from this checkpoint instead of using the goldens.",
            rich_help_panel=CHECK,
            autocompletion=values("tiny"),
        ),
    ] = None,
    adapter: Adapters = None,
    tolerances: Tolerances = None,
    report: ReportFolder = None,
    device: Device = None,
    threads: Threads = None,
    ray: Ray = None,
    trust_engine: TrustEngine = False,
    as_json: Json = False,
) -> None:
    """Run the parity check: compare a bundle with recorded outputs of PyTorch, stage by stage.

    All backends and precisions of the bundle are checked unless you name one. A JSON and an HTML
    report are written to the reports folder of the bundle. If a stage fails, the report names the
    first layer that differs.

    Exit code 0: all stages passed; 1: a stage failed; 3: a stage could not be judged on this
    machine.
    """
    from dsvl_export.cli import display
    from dsvl_export.cluster.ray_cluster import ray_cluster
    from dsvl_export.parity_check import parity as run_parity
    from dsvl_export.parity_check.tolerances import load_tolerances
    from runtimes.backends.engines.trust import trust_engines
    from runtimes.bundle.bundle import Bundle

    if adapter and not live:
        raise UserError("--adapter belongs to --live; pass --live CHECKPOINT too.")
    opened = Bundle.open(bundle)
    if trust_engine:
        trust_engines(opened)
    opened.select(backend, precision)  # an error lists what the bundle has
    pairs = opened.matching(backend, precision)
    items, table = _task_items(task, opened), load_tolerances(tolerances)

    def run(opened: Bundle, on_step: OnStep) -> ParityResult:
        return run_parity(
            opened,
            *pair,
            task=items,
            taps=taps,
            live=live,
            adapters=adapter or (),
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
            results.append(run_and_record(bundle, " ".join(pair), run, report))
            if not as_json:
                display.print_parity(results[-1][1])
    if as_json:
        display.print_json([document for document, _ in results])
    exit_with_verdict([result for _, result in results])


@command("compare")
def compare(
    bundle_a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="Bundle to use as the reference.")],
    bundle_b: Annotated[Path, typer.Argument(metavar="BUNDLE_B", help="Bundle to compare with it.")],
    backend_a: Annotated[
        Optional[str],
        typer.Option(
            help="Backend of A. Default: the first in the bundle.",
            autocompletion=bundle_backends("bundle_a"),
        ),
    ] = None,
    precision_a: Annotated[
        Optional[str],
        typer.Option(
            help="Precision of A. Default: the first in the bundle.",
            autocompletion=bundle_precisions("bundle_a", "backend_a"),
        ),
    ] = None,
    backend_b: Annotated[
        Optional[str],
        typer.Option(
            help="Backend of B. Default: the first in the bundle.",
            autocompletion=bundle_backends("bundle_b"),
        ),
    ] = None,
    precision_b: Annotated[
        Optional[str],
        typer.Option(
            help="Precision of B. Default: the first in the bundle.",
            autocompletion=bundle_precisions("bundle_b", "backend_b"),
        ),
    ] = None,
    task: Task = None,
    taps: Taps = False,
    tolerances: Tolerances = None,
    report: Annotated[
        Optional[Path],
        typer.Option("--report", metavar="FOLDER", help="Write compare.json and compare.html to it."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare two bundles, or two precisions of a bundle, in the same stages as 'parity'.

    The tolerances of both precisions are added. The exit codes are those of 'parity'.

    Example: dsvl-export compare old-bundle new-bundle --precision-a fp16 --precision-b fp16
    """
    from dsvl_export.cli import display
    from dsvl_export.parity_check import compare as run_compare
    from dsvl_export.parity_check.report.document import make_document
    from dsvl_export.parity_check.report.record import write_report
    from dsvl_export.parity_check.tolerances import load_tolerances
    from runtimes.bundle.bundle import Bundle

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
    exit_with_verdict([result])


def run_and_record(
    folder: Path, label: str, run: Callable[[Bundle, OnStep], ParityResult], report: Path | None = None
) -> tuple[dict[str, Any], ParityResult]:
    """Run the parity check with a progress bar, and write the verdict to the bundle.

    Args:
        folder: the bundle.
        label: text of the progress bar.
        run: the parity check; takes the bundle and the callback for progress.
        report: folder for the report; if it is given, the bundle is left unchanged.

    Returns:
        The document of the report and the result.
    """
    from dsvl_export.cli import display
    from dsvl_export.parity_check.report.document import make_document
    from dsvl_export.parity_check.report.record import record_verdict, report_name, write_report
    from runtimes.bundle.bundle import Bundle

    opened = Bundle.open(folder)
    with display.step_bar(label) as on_step:
        result = run(opened, on_step)
    if report:
        name = report_name(result.backend, result.precision)
        _announce(write_report(opened, result, report, name, opened.folder / "goldens" / "images"))
    elif opened.downloaded:
        say(
            "The bundle is in the cache of the hub; pass --report FOLDER to keep the report.",
            stream=sys.stderr,
        )
    else:
        try:
            _announce(record_verdict(opened, result))
        except (OSError, UserError) as error:  # read-only, or being exported
            say(f"The verdict was not written to the bundle: {error}", stream=sys.stderr)
    return make_document(opened, result), result


def _announce(report: Path) -> None:
    """Print the path of a report."""
    hint = "" if report.suffix == ".html" else " (pip install 'dsvl-export[report]' adds the HTML page)"
    say(f"Report: {report}{hint}", stream=sys.stderr)


def exit_with_verdict(results: list[ParityResult]) -> None:
    """Exit with the code of the worst verdict, unless all passed."""
    codes = {result.exit_code for result in results}
    for code in (1, 3):
        if code in codes:
            raise typer.Exit(code)


def _task_items(task: str | None, bundle: Bundle) -> list[TaskItem] | None:
    """Return the questions of ``--task``; the default for bundles of the tiny model is its own."""
    from reference.tiny import HELDOUT, TINY_DIGEST
    from runtimes.goldens.task import load_task

    tiny = bundle.manifest.checkpoint["sha256"] == TINY_DIGEST
    if task == "none" or (task is None and not tiny):
        return None
    if task not in (None, "heldout"):
        return load_task(Path(task))
    items = load_task(HELDOUT)
    # The recorded answers are valid for the bundled weights only.
    return items if tiny else [replace(item, reference=None, reference_tokens=None) for item in items]
