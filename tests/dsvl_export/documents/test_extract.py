"""Fields from folders of images: lines, errors, interruptions, and outputs of something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dsvl_export.documents import extract as module
from dsvl_export.documents.extract import Extracted, ExtractOptions, extract, extract_files
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.locks import locked
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from runtimes.structured.response_format import FormatError, ResponseFormat

SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "maxLength": 4},
    },
    "required": ["number", "note"],
    "additionalProperties": False,
}
OPTIONS = ExtractOptions(ResponseFormat.json_schema(SCHEMA), "What number is in the picture?", threads=1)


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Path]) -> Path:
    """Four images, one of them in a subfolder, a damaged one, and something else."""
    made = tmp_path / "scans"
    (made / "more").mkdir(parents=True)
    for place, picture in zip(
        ("a.png", "b.PNG", "more/größe.png", "z.png"), [*pictures[:3], pictures[0]], strict=True
    ):
        shutil.copy(picture, made / place)
    (made / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    (made / "notes.txt").write_text("no image")
    return made


def rows(output: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len({row["file"] for row in found}) == len(found)
    return {row["file"]: row for row in found}


def test_a_line_for_each_image(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = extract(tiny_bundle, folder, tmp_path / "o.jsonl", OPTIONS, lambda *step: steps.append(step))
    assert result == Extracted(5, 1, 0)
    found = rows(tmp_path / "o.jsonl")
    assert list(found) == ["a.png", "b.PNG", "damaged.jpg", "more/größe.png", "z.png"]
    assert steps == [("", 0, 5), *((name, place, 5) for place, name in enumerate(found, 1))]
    assert "is not a readable image" in found["damaged.jpg"]["error"]
    alone = Pipeline.open(tiny_bundle, threads=1)
    options = GenerationOptions(512, response_format=SCHEMA)
    for name in found.keys() - {"damaged.jpg"}:
        jsonschema.validate(found[name]["data"], SCHEMA)
        assert json.loads(alone.chat(OPTIONS.prompt, [folder / name], options).text) == found[name]["data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "scans"]


def test_an_interrupted_run_resumes(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is complete is kept; a torn line and errors are done again."""
    whole, output, asked = module._row, tmp_path / "o.jsonl", []

    def interrupted(pipeline: Pipeline, file: Any, options: ExtractOptions) -> Any:
        asked.append(file[1])
        if file[1].startswith("more") and len(asked) < 5:
            raise KeyboardInterrupt
        return whole(pipeline, file, options)

    monkeypatch.setattr(module, "_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_bundle, folder, output, OPTIONS)
    assert list(rows(output)) == ["a.png", "b.PNG", "damaged.jpg"]
    output.write_bytes(output.read_bytes() + b'{"file": "more/gr')
    shutil.copy(folder / "a.png", folder / "damaged.jpg")
    assert extract(tiny_bundle, folder, output, OPTIONS) == Extracted(5, 0, 2)
    assert asked == [
        "a.png",
        "b.PNG",
        "damaged.jpg",
        "more/größe.png",
        "damaged.jpg",
        "more/größe.png",
        "z.png",
    ]
    found = rows(output)
    assert len(found) == 5 and all("data" in row for row in found.values())
    content = output.read_bytes()
    assert extract(tiny_bundle, folder, output, OPTIONS) == Extracted(5, 0, 5)
    assert output.read_bytes() == content and len(asked) == 7


def test_what_is_not_complete_is_an_error(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    short = ExtractOptions(OPTIONS.schema, OPTIONS.prompt, generation=GenerationOptions(5), threads=1)
    assert extract(tiny_bundle, folder, tmp_path / "o.jsonl", short).failed == 5
    row = rows(tmp_path / "o.jsonl")["a.png"]
    assert row["error"] == "The answer was not complete after 5 tokens." and row["text"].startswith("{")


def test_a_cluster_gives_the_same_rows(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    def spread(function: Any, parts: Any) -> Any:
        assert function is extract_files and [len(files) for _, files, _ in parts] == [5]
        yield from ((index, function(*part)) for index, part in enumerate(parts))

    for name, cluster in (("one", None), ("two", spread)):
        extract(tiny_bundle, folder, tmp_path / name, OPTIONS, spread=cluster)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_outputs_of_something_else_are_left_alone(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    extract(tiny_bundle, folder, output, OPTIONS)
    content = output.read_bytes()
    other = ExtractOptions(ResponseFormat.json_object(), OPTIONS.prompt, threads=1)
    with pytest.raises(
        UserError, match="Line 1 of .* is not of this extraction, but of another bundle, schema, prompt"
    ):
        extract(tiny_bundle, folder, output, other)
    assert output.read_bytes() == content
    with locked(tmp_path / ".o.jsonl.lock"), pytest.raises(UserError, match="Another extraction is writing"):
        extract(tiny_bundle, folder, output, OPTIONS)
    line = content.splitlines(keepends=True)[0]
    for own in (
        b"a user's notes\n",
        b"notes without an end",
        b"\x89PNG\r\n\x1a\n\0",
        line + b"notes",
        b"[1]\n",
    ):
        (tmp_path / "own").write_bytes(own)
        with pytest.raises(UserError, match="is not of this extraction|is not the output of an extraction"):
            extract(tiny_bundle, folder, tmp_path / "own", OPTIONS)
        assert (tmp_path / "own").read_bytes() == own
    with pytest.raises(UserError, match="is not a regular file"):
        extract(tiny_bundle, folder, folder, OPTIONS)


def test_what_cannot_be_extracted(tiny_bundle: Bundle, folder: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "empty").mkdir()
    for images, output, sentence in (
        (tmp_path / "missing", "o", "is not a folder of images"),
        (tmp_path / "empty", "o", "There are no images in"),
        (folder, "none/o", "none does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            extract(tiny_bundle, images, tmp_path / output, OPTIONS)
        assert not (tmp_path / output).exists()
    impossible = ExtractOptions(
        ResponseFormat.json_schema({"type": "array", "minItems": 9999}), "?", threads=1
    )
    with pytest.raises(FormatError, match="tokens or more, but the KV cache holds"):
        extract(tiny_bundle, folder, tmp_path / "o", impossible)
    assert not (tmp_path / "o").exists()
    schema = tmp_path / "s.json"
    schema.write_text(json.dumps(SCHEMA))
    command = [
        "extract",
        tiny_bundle.folder,
        "--schema",
        schema,
        "--images",
        folder,
        "--output",
        tmp_path / "o",
    ]
    done = run(*command, "--json")
    assert done.code == 1 and json.loads(done.out) == {
        "output": str(tmp_path / "o"),
        "files": 5,
        "failed": 1,
        "resumed": 0,
    }
    done = run(*command)
    assert done.code == 1 and "5 images, 4 of them before; 1 have an error." in done.out
    schema.write_text("{")
    done = run(*command)
    assert done.code == 2 and "s.json is not valid JSON" in done.err
