"""Extracts the fields of a JSON Schema from a folder of images, one JSON line for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsvl_export.cluster.ray_cluster import Spread
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import parse_json, sha256_of_text, write_bytes
from runtimes.bundle.locks import locked
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.images import image_files
from runtimes.pipeline import Pipeline
from runtimes.structured.response_format import ResponseFormat

FILES_PER_CALL = 8  # of a cluster
OnStep = Callable[[str, int, int], None]
File = tuple[Path, str]  # an image, and its name in the output


@dataclass(frozen=True)
class ExtractOptions:
    """What is asked about each image, and of which model.

    Args:
        schema: the JSON Schema of the fields.
        prompt: the question; the fields are in the schema, which the model does not see.
        generation: how to generate; its response format is replaced by the schema.
        backend: one of the bundle's backends; None selects the first.
        precision: one of the bundle's precisions; None selects the first.
        device: device to run on; None is the backend's default.
        threads: number of CPU threads; None lets the backend choose.
        capacity: tokens of the KV cache; None is the bundle's default.
    """

    schema: ResponseFormat
    prompt: str
    generation: GenerationOptions = field(default_factory=lambda: GenerationOptions(512))
    backend: str | None = None
    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class Extracted:
    """Counts of an extraction.

    Args:
        files: images in the folder.
        failed: images without fields; their lines have the reasons.
        resumed: images whose lines an earlier run had written.
    """

    files: int
    failed: int
    resumed: int


def extract(
    bundle: str | Path | Bundle,
    images: str | Path,
    output: str | Path,
    options: ExtractOptions,
    on_step: OnStep = lambda name, done, total: None,
    spread: Spread | None = None,
) -> Extracted:
    """Extract the fields of a schema from every image of a folder and its subfolders.

    A line of the output is ``{"file": …, "data": …, "run": …}``, or has ``error`` instead of
    ``data``. It is written as soon as the image is done. If the run is interrupted, the same call
    resumes: images with data are skipped, those with an error are tried again.

    Args:
        bundle: the bundle or its folder.
        images: folder of the images.
        output: the JSON Lines file.
        options: what is asked, and of which model.
        on_step: called with the name of an image, the number of images that are done, and of all.
        spread: distributes the images to a cluster; None uses this machine only.

    Raises:
        UserError: there are no images, the output belongs to another extraction, or the bundle or
            the schema cannot be used.
    """
    images, output = Path(images).expanduser().resolve(), Path(output).expanduser()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if not images.is_dir():
        raise UserError(f"{images} is not a folder of images.")
    if not output.parent.is_dir():
        raise UserError(f"The folder {output.parent} does not exist.")
    files = [(file, _name(file, images)) for file in image_files(images)]
    if not files:
        raise UserError(f"There are no images in {images}.")
    options = replace(options, generation=replace(options.generation, response_format=options.schema))
    run = _run_id(bundle, options)
    busy = f"Another extraction is writing {output}."
    with locked(output.with_name(f".{output.name}.lock"), busy):
        done = _resume(output, run)
        waiting = [file for file in files if file[1] not in done]
        if waiting and spread is None:
            _pipeline(bundle.folder, options)  # what it cannot do is said before anything is written
        failed, count = 0, len(files) - len(waiting)
        resumed = count
        on_step("", count, len(files))
        with output.open("ab") as lines:
            for row in _rows(bundle.folder, waiting, options, spread):
                failed += "error" in row
                count += 1
                lines.write(json.dumps({**row, "run": run}, ensure_ascii=False).encode() + b"\n")
                lines.flush()
                on_step(row["file"], count, len(files))
    return Extracted(len(files), failed, resumed)


def _name(file: Path, folder: Path) -> str:
    """Return the path of an image relative to its folder, as UTF-8 can write it."""
    return file.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode()


def _run_id(bundle: Bundle, options: ExtractOptions) -> str:
    """Return a short hash of all that the answers depend on."""
    manifest = bundle.manifest
    choice = bundle.select(options.backend, options.precision)
    artifacts = bundle.artifacts(*choice).values()
    files = sorted({manifest.files[file].sha256 for item in artifacts for file in item.files})
    asked = [manifest.checkpoint["sha256"], files, options.prompt, repr(options.generation), options.capacity]
    return sha256_of_text(json.dumps(asked))[:12]


def _resume(output: Path, run: str) -> set[str]:
    """Remove the torn line and the errors of an earlier run; return the images that it has done.

    Raises:
        UserError: the output is not of this extraction, or cannot be read or written.
    """
    if not output.exists():
        return set()
    if not output.is_file():
        raise UserError(f"{output} is not a regular file; choose another output.")
    try:
        content = output.read_bytes()
    except OSError as error:
        raise UserError(f"{output} cannot be read: {error.strerror}.") from error
    *lines, torn = content.split(b"\n")
    done: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or row.get("run") != run or "file" not in row:
            raise UserError(
                f"Line {number} of {output} is not of this extraction, but of another bundle, schema, prompt"
                " or options, or something else; choose another output, or delete the file."
            )
        if "error" not in row:
            done[row["file"]] = line + b"\n"
    if torn and not torn.startswith(b'{"file": '):
        raise UserError(f"{output} is not the output of an extraction; choose another output.")
    if (kept := b"".join(done.values())) != content:
        write_bytes(output, kept)
    return set(done)


def _rows(
    folder: Path, files: Sequence[File], options: ExtractOptions, spread: Spread | None
) -> Iterator[dict[str, Any]]:
    """Yield the row of each image, in the order in which they are done."""
    if spread is None:
        for file in files:
            yield from extract_files(folder, [file], options)
        return
    starts = range(0, len(files), FILES_PER_CALL)
    parts = [(folder.resolve(), files[start : start + FILES_PER_CALL], options) for start in starts]
    for _, rows in spread(extract_files, parts):
        yield from rows


def extract_files(folder: Path, files: Sequence[File], options: ExtractOptions) -> list[dict[str, Any]]:
    """Return the rows of some images; the bundle stays open for the next call.

    Args:
        folder: the bundle's.
        files: the images.
        options: what is asked, and of which model.
    """
    pipeline = _pipeline(folder, options)
    return [_row(pipeline, file, options) for file in files]


@lru_cache(maxsize=1)
def _pipeline(folder: Path, options: ExtractOptions) -> Pipeline:
    pipeline = Pipeline.open(
        folder, options.backend, options.precision, threads=options.threads, device=options.device,
        capacity=options.capacity,
    )  # fmt: skip
    pipeline.grammars.fitting(options.generation.format, 0, pipeline.capacity)
    return pipeline


def _row(pipeline: Pipeline, file: File, options: ExtractOptions) -> dict[str, Any]:
    """Return the row of one image; what is wrong with it is its error."""
    path, name = file
    text = ""
    try:
        answer = pipeline.chat(options.prompt, [path], options.generation)
        text = answer.text
        if answer.finish_reason != "eos":
            raise UserError(f"The answer was not complete after {len(answer.tokens)} tokens.")
        return {"file": name, "data": parse_json(text, "The answer")}
    except (UserError, OSError) as error:
        return {"file": name, "error": str(error), **({"text": text} if text else {})}
