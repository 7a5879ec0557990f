"""The model card of a published bundle, from its manifest and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.units import size

CARD = "README.md"
# Released DeepSeek-VL and Janus weights, and what is derived from them, are under this license.
LICENSE_NAME = "deepseek"
LICENSE_LINK = "https://github.com/deepseek-ai/DeepSeek-LLM/blob/HEAD/LICENSE-MODEL"
STAGES = ("prefill_logits", "teacher_forced_logits")
EXTRAS = {"tensorrt_rtx": "tensorrt-rtx"}  # where an extra is not called like its backend


@dataclass(frozen=True)
class CardOptions:
    """Fields of the model card that a manifest does not have.

    Args:
        base_model: hub id of the model that was exported; None leaves it out.
        license: an identifier of the hub, such as ``mit``; None is DeepSeek's model license.
    """

    base_model: str | None = None
    license: str | None = None


def model_card(bundle: Bundle, repository: str, options: CardOptions) -> str:
    """Write the card as Markdown.

    Args:
        bundle: the bundle that is published.
        repository: the hub id under which it is published, for the commands in the card.
        options: base model and license.

    Raises:
        UserError: the bundle holds no artifacts, or a report of it cannot be read.
    """
    manifest = bundle.manifest
    checkpoint, decoder = manifest.checkpoint, manifest.model["decoder"]
    total = sum(entry.bytes for entry in manifest.files.values())
    if not bundle.choices():
        raise UserError(f"The bundle {bundle.folder} holds no artifacts; export it first.")
    backend, precision = bundle.choices()[0]
    backends = dict.fromkeys(item.backend for item in bundle.artifacts(backend, precision).values())
    extras = ", ".join(f"`{EXTRAS.get(name, name)}`" for name in backends)
    vision = "SigLIP and SAM" if manifest.model["vision"]["sam"] else "SigLIP"
    lines = [
        "---",
        *_front_matter(options, manifest.model.get("family", "deepseek_vl").replace("_", "-")),
        "---",
        "",
        f"# {repository.partition('/')[2]}",
        "",
        f"`{_code(checkpoint['name'])}`, exported with dsvl-export: {vision}, a decoder of"
        f" {decoder['layers']} layers × {decoder['width']}, {size(total)} in {len(manifest.files)} files."
        f" SHA-256 of the checkpoint: `{checkpoint['sha256']}`.",
        "",
        "## Artifacts",
        "",
        *_table(bundle),
        "",
        "Errors are relative root mean squares of logits against the PyTorch reference in fp32, the"
        " largest of all recorded prompts. `dsvl-export parity` repeats the comparison.",
        "",
        "## Run",
        "",
        f"Install `dsvl-export` with the extras {extras} and `hub`.",
        "",
        "```",
        f"dsvl-export run {repository} --backend {backend} --precision {precision} --image photo.jpg"
        ' --prompt "Describe the picture."',
        f"dsvl-export serve {repository} --backend {backend} --precision {precision}",
        f"dsvl-export parity {repository} --backend {backend} --precision {precision}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(options: CardOptions, family: str) -> list[str]:
    rows = [
        "library_name: dsvl-export",
        "pipeline_tag: image-text-to-text",
        f"tags: [{family}, dsvl-export]",
    ]
    if options.base_model:
        rows.append(f"base_model: {options.base_model}")
    if options.license:
        return [*rows, f"license: {options.license}"]
    return [*rows, "license: other", f"license_name: {LICENSE_NAME}", f"license_link: {LICENSE_LINK}"]


def _table(bundle: Bundle) -> list[str]:
    """Return a Markdown table with one row for each backend and precision."""
    headings = ("backend", "precision", "target", "size", "parity", "prefill logits", "teacher-forced logits")
    rows = [headings, ("---",) * len(headings)]
    for backend, precision in bundle.choices():
        parts = bundle.artifacts(backend, precision).values()
        paths = {path for item in parts for path in item.files}
        total = size(sum(bundle.manifest.files[path].bytes for path in paths))
        targets = ", ".join(dict.fromkeys(item.target for item in parts))
        verdict = bundle.manifest.parity.get(f"{backend}/{precision}", {})
        judged = str(verdict.get("verdict", "not run"))
        if "execution" in verdict:
            judged = f"{judged} ({verdict['execution']})"
        errors = _errors(bundle, verdict)
        rows.append(
            (backend, precision, targets, total, judged, *(errors.get(stage, "") for stage in STAGES))
        )
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _errors(bundle: Bundle, verdict: dict[str, Any]) -> dict[str, str]:
    """Return the largest relative error of each stage, from the report of a verdict.

    Raises:
        UserError: the report cannot be read.
    """
    file = bundle.folder / str(verdict.get("report", ""))
    if not verdict or not file.is_file():
        return {}
    try:
        return {
            str(stage["name"]): _error(stage["errors"]["relative_rms"])
            for stage in read_json(file).get("stages", [])  # reports of 0.4 have no key of this name
            if stage["errors"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a parity report; run parity again.") from error


def _error(value: float | None) -> str:
    """Return an error as text; None stands for NaN in reports."""
    return "NaN" if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")
