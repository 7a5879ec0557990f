"""The HTML page of a report: one file, nothing outside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dsvl_export.parity_check.report.plots import drift_plot, ladder_plot
from runtimes.errors import UserError
from runtimes.images import load_image
from runtimes.text.prompt import IMAGE_PLACEHOLDER
from runtimes.units import size

THUMBNAIL = 220  # pixels, longest side
WORDS = {"passed": "Passed", "failed": "Failed", "not judged": "Could not be judged"}


def render(document: dict[str, Any], images: Path) -> str:
    """The page of a report document.

    Args:
        images: folder of the goldens' images; what is not there is left out.
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
    judged = any(rung["errors"] for rung in document["rungs"])
    return environment.get_template("report.html.j2").render(
        report=document,
        word=_word(document),
        summary=_summary(document),
        ladder=Markup(ladder_plot(document["rungs"])) if judged else "",
        drift=[(row, Markup(drift_plot(row)) if row["taps"] else "") for row in document["drift"]],
        thumbnails={name: _thumbnail(images / name) for name in sorted(names)},
    )


def _word(document: dict[str, Any]) -> str:
    """The verdict, and whether a substitute stood for the target's own runtime."""
    word, kind = WORDS[document["verdict"]], document["execution"]["kind"]
    return f"{word}, {kind}" if document["verdict"] != "not judged" and kind != "ran" else word


def _summary(document: dict[str, Any]) -> str:
    """The verdict in one or two sentences."""
    if document["verdict"] == "not judged":
        unjudged = [rung for rung in document["rungs"] if rung["state"] in ("not judged", "not run")]
        reasons = [
            f"{rung['name'].replace('_', ' ')}: {rung['detail']}" for rung in unjudged if rung["detail"]
        ]
        execution = document["execution"]
        reason = reasons[0] if reasons else f"{execution['kind']}: {execution['by']}"
        return f"Nothing is claimed: {reason}."
    failed = [rung["name"].replace("_", " ") for rung in document["rungs"] if rung["state"] == "failed"]
    if not failed:
        execution = document["execution"]
        how = "" if execution["kind"] == "ran" else f" ({execution['kind']} by {execution['by']})"
        return f"Every stage computes what the reference computes, within the bounds of this precision{how}."
    begins = [
        f"{row['component'].replace('_', ' ')}, {row['first']}" for row in document["drift"] if row["first"]
    ]
    where = f" The error begins in the {'; and in the '.join(begins)}." if begins else ""
    return f"Beyond their bounds: {', '.join(failed)}.{where}"


def _thumbnail(file: Path) -> str | None:
    """A small copy as a data URL; None where the image is not there any more."""
    try:
        image = load_image(file)
    except UserError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _question(prompt: str) -> str:
    """The last user message of a prompt; a single leading placeholder is left out."""
    text = prompt.rpartition("User: ")[2].rpartition("\n\nAssistant:")[0] or prompt
    if text.count(IMAGE_PLACEHOLDER) == 1:
        text = text.removeprefix(IMAGE_PLACEHOLDER)
    return " ".join(text.replace(IMAGE_PLACEHOLDER, "[image]").split())


def _piece(text: str) -> str:
    """A token's text, special tokens by a short name."""
    if text.startswith("<｜") and text.endswith("｜>"):
        name = text[2:-2].replace("▁", " ")
        return "‹end›" if name == "end of sentence" else f"‹{name}›"
    return text.replace("\n", "↵")


def _error(value: float | None) -> str:
    if value is None:
        return "no number"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _percent(value: float) -> str:
    return f"{value:.1%}"
