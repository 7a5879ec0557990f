"""The documents: links resolve, commands are valid, prose is short enough to read in a terminal.

``make docs`` checks what only the built site has: the navigation, and anchors of generated pages.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomllib
import typer

from dsvl_export.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "reference/tiny", "integrations/optimum")),
]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
COLUMNS = 100
README_LINES = 150
# Of optimum-cli and of benchmarks/onnxruntime_versions.py.
OTHER_OPTIONS = {"--model", "--ignore-floors"}

FENCE = re.compile(r"^ *```(\w*)$")
LINK = re.compile(r"\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
PROGRAM = re.compile(
    r"^(?:\.venv/bin/|OMP_NUM_THREADS=1 )?(dsvl-export|optimum-cli|make|python3?|pytest|pip)\s"
)
FOLDERS = "dsvl_export|calibration|reference|runtimes|tests|benchmarks|docs|integrations"
FILE = re.compile(rf"^(?:{FOLDERS})/[\w./-]+$")


class Command(NamedTuple):
    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def split(document: Path) -> tuple[list[str], list[str]]:
    """The lines outside and inside code blocks without a language."""
    prose, code, language = [], [], None
    for line in text_of(document).replace(" \\\n", " ").splitlines():
        fence = FENCE.match(line)
        if fence:
            language = None if language is not None else fence[1]
        elif language is None:
            prose.append(line)
        elif language == "":
            code.append(line)
    assert language is None, f"{document}: a code block does not end"
    return prose, code


def spans(document: Path) -> list[str]:
    return SPAN.findall("\n".join(split(document)[0]))


def commands() -> Iterator[Command]:
    """The command lines in code blocks, and the complete ones in benchmarks' and tests' spans."""
    for document in DOCUMENTS:
        name = str(document.relative_to(ROOT))
        scripts = [
            span for span in spans(document) if span.startswith(("python benchmarks/", "pytest tests/"))
        ]
        for line in [*split(document)[1], *scripts]:
            if PROGRAM.match(line):
                words = " ".join(shlex.quote(word) for word in shlex.split(line, comments=True))
                for part in words.split(" '&&' "):
                    yield Command(name, tuple(shlex.split(part)))


@cache
def parsers() -> dict[str, Any]:
    """The commands of ``dsvl-export``, by name; the empty name is ``dsvl-export`` itself."""
    group: Any = typer.main.get_command(app)
    return {"": group, **group.commands}


def options_of(name: str) -> set[str]:
    found = {"--help", "--debug"}
    for item in parsers()[name].params:
        found |= {option for option in (*item.opts, *item.secondary_opts) if option.startswith("-")}
    return found


def parse(name: str, *words: str) -> None:
    """Parse a command line as ``dsvl-export`` does, values included; nothing runs."""
    assert name in parsers(), f"dsvl-export has no command {name!r}"
    parsers()[name].make_context(name, list(words))


def check(command: Command) -> None:
    """Check that everything that a command line names exists."""
    start = next(place for place, word in enumerate(command.words) if not re.match(r"^\w+=", word))
    program, words = Path(command.words[start]).name, list(command.words[start + 1 :])
    if program == "dsvl-export":
        if words[0].startswith("-"):
            assert words[0] in options_of("")
        else:
            parse(*words)
    elif program == "optimum-cli":
        assert words[:3] == ["export", "dsvl", "--model"]
        parse("export", *words[3:])
    elif program == "make":
        target = rf"^{re.escape(words[0])}:"
        assert re.search(target, text_of(ROOT / "Makefile"), re.MULTILINE), f"make has no {words[0]}"
    elif program == "pip":
        for word in words:
            assert not re.match(r"^dsvl-export\b(?!-)", word), "the project is not on an index"
            extras = re.search(r"\[([\w,-]+)\]$", word)
            assert not extras or set(extras[1].split(",")) <= EXTRAS, f"{word}: no such extra"
    elif words[:1] == ["-m"]:
        module = words[1].replace(".", "/")
        known = (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()
        assert known or module in ("venv", "gpu")
    else:
        for word in words:
            assert not FILE.match(word) or (ROOT / word).exists(), word


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(document: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in split(document)[0] if line.startswith("#")}


def test_the_documents_are_found() -> None:
    assert len(DOCUMENTS) > 30
    assert len(list(commands())) > 100
    assert ROOT / "docs/explanation/parity.md" in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for target in LINK.findall("\n".join(split(document)[0])):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.is_file(), f"{target} does not exist"
        if anchor and "<!-- generate:" not in text_of(linked):
            assert anchor in anchors(linked), f"{linked.name} has no heading {anchor!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document: Path) -> None:
    for span in spans(document):
        if FILE.match(span):
            assert (ROOT / span).exists(), f"{span} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_lines_are_short(document: Path) -> None:
    lines = [line for line in split(document)[0] if not line.startswith("|")]
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert [line for line in lines if line.count("`") % 2] == [], "inline code continues on the next line"


@pytest.mark.parametrize("command", commands(), ids=str)
def test_commands_are_valid(command: Command) -> None:
    check(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_prose_exist(document: Path) -> None:
    """Commands in the text may leave arguments out, so only their options are checked."""
    every = OTHER_OPTIONS.union(*map(options_of, parsers()))
    for span in spans(document):
        words = span.removeprefix("dsvl-export ").split()
        if not words or (span == words[0] and not span.startswith("--")):
            continue
        name = words[0] if words[0] in parsers() else ""
        if not name and not span.startswith(("--", "dsvl-export ")):
            continue
        known = options_of(name) if name else every
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"`{span}`: there is no option {word}"


def test_the_guide_to_backends_names_what_backends_have() -> None:
    guide = text_of(ROOT / "docs/how-to/add-a-backend.md")
    names = re.findall(r"^\| `(\w+)", guide, re.MULTILINE)
    assert {"PRECISIONS", "compile_component", "execution", "open_decoder"} <= set(names)
    folders = ("dsvl_export/compilers", "runtimes/backends")
    code = "\n".join(text_of(file) for folder in folders for file in (ROOT / folder).rglob("*.py"))
    for name in names:
        assert re.search(rf"^ *(?:def )?{name}\b", code, re.MULTILINE), f"no backend has {name}"


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) < README_LINES


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("dsvl-export export tiny --no-such-option --output b", "no-such-option"),
        ("dsvl-export no-such-command", "no-such-command"),
        ("dsvl-export plan tiny --context many", "valid integer"),
        ("make no-such-target", "no-such-target"),
        ("pip install 'dsvl-export[cpu]'", "not on an index"),
        ("pip install '.[no-such-extra]'", "no such extra"),
        ("python benchmarks/no_such_script.py WORK", "no_such_script"),
    ],
)
def test_wrong_commands_are_found(line: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        check(Command("", tuple(shlex.split(line))))
