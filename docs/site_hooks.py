"""MkDocs hooks: pages from files outside ``docs/``, and pages generated from code and data.

``INCLUDED`` files appear on the site as they are. In pages of ``docs/``, a line
``<!-- generate: NAME -->`` is replaced with the output of ``GENERATORS[NAME]``. Nothing
is copied, so the pages follow the code.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Site path → file of the repository.
INCLUDED = {
    "index.md": "README.md",
    "explanation/benchmarks.md": "benchmarks/README.md",
    "explanation/tiny-model.md": "reference/tiny/README.md",
    "explanation/curve.svg": "reference/tiny/curve.svg",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
MARKER = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the included files to the site."""
    for path, source in INCLUDED.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts of a page, and make its links valid on the site."""
    path = page.file.src_uri
    markdown = MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)
    source = INCLUDED.get(path, f"docs/{path}")
    return LINK.sub(lambda match: _site_link(match, source, path), markdown)


def _site_link(match: re.Match[str], source: str, path: str) -> str:
    """Return a link as the page ``path`` needs it, which the file ``source`` contains."""
    image, text, target = match.groups()
    if ":" in target or target.startswith("#"):
        return match[0]
    target, _, anchor = target.partition("#")
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    on_site = {included: page for page, included in INCLUDED.items()}.get(linked)
    if on_site is None and linked.startswith("docs/"):
        on_site = linked.removeprefix("docs/")
    if on_site is None:  # a file of the repository that the site does not contain
        return text if text.startswith("`") else f"{text} (`{linked}`)"
    relative = posixpath.relpath(on_site, posixpath.dirname(path) or ".")
    return f"{image}[{text}]({relative}{'#' if anchor else ''}{anchor})"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _code(values: Iterable[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _escape(text: str) -> str:
    """Return plain text as Markdown that shows it unchanged, on one line."""
    return html.escape(" ".join(text.split()), quote=False).replace("*", "\\*")


def python_api() -> str:
    """Return the public names, and the types of what they return, as mkdocstrings directives."""
    import dsvl_export
    from dsvl_export import Pipeline, parity

    names = [name for name in dsvl_export.__all__ if not name.startswith("_")]
    choices = get_args(get_type_hints(Pipeline.open)["bundle"])
    bundle = next(choice for choice in choices if choice.__module__.startswith("runtimes."))
    results = (get_type_hints(Pipeline.chat)["return"], get_type_hints(parity)["return"], bundle)
    parts = [f"::: dsvl_export.{name}" for name in names]
    parts += [f"::: {result.__module__}.{result.__qualname__}" for result in results]
    return "\n\n".join(parts)


def command_line() -> str:
    """Return the reference of all commands and options, from the typer application."""
    from dsvl_export.cli import app
    from dsvl_export.cli.app import PANELS

    group: Any = typer.main.get_command(app)
    parts = []
    for panel, names in PANELS.items():
        parts += [f"## {panel}", *(_command(name, group.commands[name]) for name in names)]
    return "\n\n".join(parts)


def _command(name: str, command: Any) -> str:
    """Return the reference of one command."""
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    usage = " ".join([f"dsvl-export {name} [OPTIONS]", *(item.metavar or item.name for item in arguments)])
    parts = [f"### dsvl-export {name}", f"```\n{usage}\n```"]
    for paragraph in command.help.split("\n\n"):
        text = " ".join(paragraph.split())
        example = text.removeprefix("Example: ")
        parts.append(f"Example: `{example}`" if example != text else _escape(text))
    options = [item for item in command.params if not getattr(item, "hidden", False)]
    panels: dict[str, list[Any]] = {}
    for item in options:
        panels.setdefault(getattr(item, "rich_help_panel", None) or "", []).append(item)
    for panel, items in panels.items():
        rows = [(_option(item), _escape(item.help or ""), _default(item)) for item in items]
        parts.append((f"**{panel}**\n\n" if panel else "") + _table(("Option", "Meaning", "Default"), rows))
    return "\n\n".join(parts)


def _option(item: Any) -> str:
    if item.param_type_name == "argument":
        return f"`{item.metavar or item.name}`"
    names = "`, `".join([*item.opts, *item.secondary_opts])
    return f"`{names}`" + ("" if item.is_flag else f" {item.metavar or item.name.upper()}")


def _default(item: Any) -> str:
    if item.required:
        return "required"
    if item.default in (None, False, (), []) or not item.show_default:
        return ""
    value = item.opts[0].lstrip("-") if item.default is True else item.default
    return f"`{value}`"


def manifest() -> str:
    """Return the keys of ``manifest.json``, from its JSON schema."""
    schema = json.loads((ROOT / "runtimes/bundle/manifest.schema.json").read_text(encoding="utf-8"))
    parts = [_table(("Key", "Type", "Meaning"), _keys(schema, ""))]
    for name, definition in schema["$defs"].items():
        parts.append(f"### {name}")
        rows = list(_keys(definition.get("items", definition), ""))
        parts.append(_table(("Key", "Type", "Meaning"), rows) if rows else _type(definition) + ".")
    return "\n\n".join(parts)


def _keys(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each key of an object, and for the keys in it."""
    required = set(schema.get("required", ()))
    properties = dict(schema.get("properties", {}))
    if isinstance(schema.get("additionalProperties"), dict):
        properties["…"] = schema["additionalProperties"]
    for name, value in properties.items():
        key = f"{prefix}{name}"
        optional = "" if name in required or name == "…" else "optional"
        meaning = value.get("description", "")
        yield f"`{key}`", _type(value), _escape("; ".join(text for text in (optional, meaning) if text))
        yield from _keys(value, f"{key}.")


def _type(value: dict[str, Any]) -> str:
    """Return the type of a value in words."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in value["enum"])
    if "anyOf" in value and "type" not in value:
        return " or ".join(map(_type, value["anyOf"]))
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    kind = value.get("type", "any")
    text = kind if isinstance(kind, str) else " or ".join(kind)
    return f"{text} matching `{value['pattern']}`" if "pattern" in value else text


def tolerances() -> str:
    """Return the table of tolerances and the file with its sources."""
    file = ROOT / "dsvl_export/parity_check/tolerances.yaml"
    content = file.read_text(encoding="utf-8")
    rows = yaml.safe_load(content)
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [(f"`{name}`", *(_tolerance(row.get(key)) for key in keys)) for name, row in rows.items()]
    return "\n\n".join([_table(("Precision", *keys), cells), "## The file", f"```yaml\n{content}```"])


def _tolerance(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {bound:g}" for name, bound in value.items())
    return f"{value:g}"


def targets() -> str:
    """Return the target devices, their backends and precisions, and their sources."""
    rows = yaml.safe_load((ROOT / "dsvl_export/targets/targets.yaml").read_text(encoding="utf-8"))
    devices = [
        (
            f"`{name}`", row["device"], row.get("memory_gb", ""), row.get("usable_gb", ""),
            row.get("bandwidth_gbs", ""),
            ", ".join(f"{precision} {value:g}" for precision, value in row.get("tops", {}).items()),
        )
        for name, row in rows.items()
    ]  # fmt: skip
    head = ("Target", "Device", "Memory, GB", "Usable, GB", "Bandwidth, GB/s", "Peak TOPS")
    parts = ["### Devices", _table(head, devices), "### Backends and precisions"]
    choices = [
        (f"`{name}`", f"`{backend}`", _code(precisions))
        for name, row in rows.items()
        for backend, precisions in row["backends"].items()
    ]
    parts += [_table(("Target", "Backend", "Precisions"), choices), "### Runtimes, notes and sources"]
    for name, row in rows.items():
        links = ", ".join(f"<{link}>" for link in row.get("sources", ()))
        text = _escape(f"{row['runtime']}. {row['notes']}")
        parts.append(f"- `{name}`: {text}" + (f" Sources: {links}" if links else ""))
    return "\n\n".join(parts)


def defects() -> str:
    """Return the known defects of the libraries and runtimes of the targets."""
    rows = yaml.safe_load((ROOT / "dsvl_export/targets/defects.yaml").read_text(encoding="utf-8"))
    cells = [
        (
            f"`{row['id']}`", _escape(row["what"]), _escape(row.get("handled") or row["do"]),
            ", ".join(f"{name} {versions}" for name, versions in row.get("packages", {}).items()),
            f"[report]({row['link']})" if row["link"] else row.get("seen", ""),
        )
        for row in rows
    ]  # fmt: skip
    return _table(("Defect", "What happens", "What dsvl-export or you can do", "Versions", "Report"), cells)


def recipes() -> str:
    """Return the precision recipes that come with the package."""
    files = sorted((ROOT / "calibration/recipes").glob("*.yaml"))
    parts = (f"## {file.stem}\n\n```yaml\n{file.read_text(encoding='utf-8')}```" for file in files)
    return "\n\n".join(parts)


GENERATORS: dict[str, Callable[[], str]] = {
    "python_api": python_api,
    "command_line": command_line,
    "manifest": manifest,
    "tolerances": tolerances,
    "targets": targets,
    "defects": defects,
    "recipes": recipes,
}
