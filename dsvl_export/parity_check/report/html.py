"""The HTML page of a report: one file that loads nothing else."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dsvl_export.parity_check.report.plots import stage_plot, tap_plot
from runtimes.errors import UserError
from runtimes.images import load_image
from runtimes.text.prompt import IMAGE_PLACEHOLDER
from runtimes.units import size

THUMBNAIL = 220  # pixels, longest side
# The last user message of a prompt, by the roles of DeepSeek-VL and Janus.
LAST_QUESTION = re.compile(r".*(?:User|<\|User\|>): (.*)\n\n(?:Assistant|<\|Assistant\|>):", re.DOTALL)
VERDICTS = {"passed": "Passed", "failed": "Failed", "not judged": "Could not be judged"}


def render(document: dict[str, Any], images: Path) -> str:
    """Return the HTML page of a report document.

    Args:
        document: from ``make_document``.
        images: folder with the images of the goldens; missing images are left out.
    """
    environment = Environment(
        loader=PackageLoader("dsvl_export.parity_check.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "error": _error,
        "size": size,
        "question": _question,
        "piece": _piece,
        "percent": _percent,
    }
    names = {name for row in document["tokens"] for name in row["images"]}
    judged = any(stage["errors"] for stage in document["stages"])
    return environment.get_template("report.html.j2").render(
        report=document,
        verdict=_verdict(document),
        summary=_summary(document),
        stage_plot=Markup(stage_plot(document["stages"])) if judged else "",
        localizations=[
            (row, Markup(tap_plot(row)) if row["taps"] else "") for row in document["localizations"]
        ],
        thumbnails={name: _thumbnail(images / name) for name in sorted(names)},
    )


def _verdict(document: dict[str, Any]) -> str:
    """Return the verdict, and the kind of execution if the target's own runtime did not run."""
    verdict, kind = VERDICTS[document["verdict"]], document["execution"]["kind"]
    return f"{verdict}, {kind}" if document["verdict"] != "not judged" and kind != "ran" else verdict


def _summary(document: dict[str, Any]) -> str:
    """Return the verdict in one or two sentences."""
    if document["verdict"] == "not judged":
        unjudged = [stage for stage in document["stages"] if stage["state"] in ("not judged", "not run")]
        reasons = [
            f"{stage['name'].replace('_', ' ')}: {stage['detail']}" for stage in unjudged if stage["detail"]
        ]
        execution = document["execution"]
        reason = reasons[0] if reasons else f"{execution['kind']}: {execution['by']}"
        return f"Not judged: {reason}."
    failed = [stage["name"].replace("_", " ") for stage in document["stages"] if stage["state"] == "failed"]
    if not failed:
        execution = document["execution"]
        how = "" if execution["kind"] == "ran" else f" ({execution['kind']} by {execution['by']})"
        return f"Every stage computes what the reference computes, within the bounds of this precision{how}."
    layers = [
        f"{row['component'].replace('_', ' ')}, {row['first']}"
        for row in document["localizations"]
        if row["first"]
    ]
    where = f" The error begins in the {'; and in the '.join(layers)}." if layers else ""
    return f"Failed stages: {', '.join(failed)}.{where}"


def _thumbnail(file: Path) -> str | None:
    """Return a small copy as a data URL; None if the image is missing."""
    try:
        image = load_image(file)
    except UserError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _question(prompt: str) -> str:
    """Return the last user message of a prompt, without a single leading placeholder."""
    last = LAST_QUESTION.fullmatch(prompt)
    text = last[1] if last else prompt
    if text.count(IMAGE_PLACEHOLDER) == 1:
        text = text.removeprefix(IMAGE_PLACEHOLDER)
    return " ".join(text.replace(IMAGE_PLACEHOLDER, "[image]").split())


def _piece(text: str) -> str:
    """Return the text of a token, or a short name of a special token."""
    if text.startswith("<｜") and text.endswith("｜>"):
        name = text[2:-2].replace("▁", " ")
        return "‹end›" if name == "end of sentence" else f"‹{name}›"
    return text.replace("\n", "↵")


def _error(value: float | None) -> str:
    """Format an error with two significant digits."""
    if value is None:
        return "no number"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _percent(value: float) -> str:
    """Format a share in percent."""
    return f"{value:.1%}"
