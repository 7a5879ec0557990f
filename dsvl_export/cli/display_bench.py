"""The output of ``bench``: two tables, a JSON document and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from dsvl_export.bench.bench import BenchResult, Timing
from dsvl_export.cli.display import out
from runtimes.bundle.files import write_json, write_text
from runtimes.errors import UserError
from runtimes.units import size


def print_bench(result: BenchResult) -> None:
    """Print the time to first token by stage, the decoding speed by context, and the prediction."""
    what = f"{result.backend} {result.precision} ({result.execution})"
    stages = Table(title=f"Time to first token of {escape(what)}")
    for heading in ("stage", "median", "lowest", "highest"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, timing in result.stages.items():
        stages.add_row(escape(name), *_times(timing))
    stages.add_section()
    stages.add_row("[bold]first token[/]", *(f"[bold]{text}[/]" for text in _times(result.first_token)))
    stages.caption = f"one image, prompt of {result.prompt_tokens} tokens"
    out.print(stages)
    decoding = Table(title="Decoding")
    for heading in ("context", "tokens/s", "lowest", "highest", "bytes per token", "bound", "of the bound"):
        decoding.add_column(heading, justify="right")
    for row in result.decoding:
        read = size(row.bytes_per_token) if row.bytes_per_token else "unknown"
        bound = f"{row.bound:,.1f}" if row.bound else "unknown"
        share = f"{row.share_of_bound:.0%}" if row.share_of_bound else ""
        slow, fast = (f"{1 / seconds:,.1f}" for seconds in (row.step.high, row.step.low))
        decoding.add_row(str(row.context), f"{row.tokens_per_second:,.1f}", slow, fast, read, bound, share)
    if result.bandwidth:
        decoding.caption = (
            f"bound: memory bandwidth ({size(round(result.bandwidth))}/s) divided by bytes per token"
        )
    out.print(decoding)
    out.print(
        f"Opened in {_time(result.opened)}, which took {size(result.loaded)} of memory;"
        f" peak memory of the process: {size(result.peak)}."
    )
    if isinstance(result.predicted, str):
        out.print(f"No prediction: {escape(result.predicted)}")
        return
    plan = result.predicted
    out.print(
        f"Prediction of 'plan' for a context of {plan['context']}: first token after at least"
        f" {_time(plan['first_token_seconds'])}, at most {plan['tokens_per_second']:,.1f} tokens/s,"
        f" {size(plan['peak_bytes'])} of memory without the token table."
    )


def write_bench(result: BenchResult, folder: Path) -> list[Path]:
    """Write ``bench.json`` and, if matplotlib is installed, ``bench.svg``; return the files.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "bench.json"]
        write_json(written[0], result.to_dict())
        try:
            from dsvl_export.bench.plot import bench_plot
        except ImportError:
            return written
        written.append(folder / "bench.svg")
        write_text(written[1], bench_plot(result))
    except OSError as error:
        raise UserError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return written


def _times(timing: Timing) -> list[str]:
    return [_time(seconds) for seconds in (timing.median, timing.low, timing.high)]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
