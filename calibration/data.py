"""Calibration data: images with prompts, from a folder, a JSONL file or the bundled set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle.files import read_json_lines
from runtimes.errors import UserError
from runtimes.images import load_image

BUNDLED = Path(__file__).parent / "bundled" / "questions.jsonl"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What a folder's images are asked, in turns.
PROMPTS = (
    "Describe the picture.",
    "What is in this image? Answer in one sentence.",
    "Is there any text or number in the picture? If so, read it.",
)
MOST_SKIPPED = 0.1  # share of the images that may be unreadable


@dataclass(frozen=True)
class Sample:
    """One request: image files, a question about them, and the place that it comes from, for errors."""

    images: tuple[Path, ...]
    question: str
    place: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the images' bytes and the question: what the sample is, wherever it lies."""
        parts = [hashlib.sha256(image.read_bytes()).hexdigest() for image in self.images]
        return hashlib.sha256("\n".join([*parts, self.question]).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationData:
    """Samples in a fixed order, and the images that were left out because they cannot be read."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()


def load_data(data: str, count: int, seed: int = 0) -> CalibrationData:
    """At most ``count`` samples of ``bundled``, a folder of images, or a JSONL file, drawn with a seed.

    A line of the file has ``image`` or ``images`` (paths relative to it) and ``prompt`` or ``prompts``.

    Raises:
        UserError: there is nothing, a line cannot be read, or too many images are unreadable.
    """
    if data == "bundled":
        rows = list(_lines(BUNDLED))
    else:
        place = Path(data).expanduser()
        if not place.exists():
            raise UserError(
                f"There is no calibration data {data}; give a folder of images, a JSONL file, or 'bundled'."
            )
        rows = _folder(place) if place.is_dir() else list(_lines(place))
    if not rows:
        raise UserError(f"{data} has no images to calibrate with.")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    chosen = [rows[index] for index in sorted(order)]
    places = {image: row.place for row in chosen for image in row.images}
    unreadable = {image: why for image, place in places.items() if (why := _unreadable(image, place))}
    kept = tuple(row for row in chosen if not unreadable.keys() & set(row.images))
    if len(kept) < (1 - MOST_SKIPPED) * len(chosen):
        first = next(iter(unreadable.values()))
        raise UserError(f"{len(unreadable)} images of {data} cannot be read, which is too many: {first}")
    # A copy would count twice, and could lie in two parts at once.
    distinct = {row.digest: row for row in kept}
    return CalibrationData(tuple(distinct.values()), tuple(sorted(map(str, unreadable))))


def _unreadable(image: Path, place: str) -> str | None:
    try:
        load_image(image)
    except UserError as error:
        return str(error).removesuffix(".") + place + "."
    return None


def _folder(folder: Path) -> list[Sample]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return [Sample((file,), PROMPTS[index % len(PROMPTS)]) for index, file in enumerate(files)]


def _lines(file: Path) -> Iterator[Sample]:
    for number, row in read_json_lines(file, "calibration data"):
        try:
            yield from _rows(row, file.parent, f", line {number} of {file}")
        except (KeyError, TypeError) as error:
            raise UserError(f"Line {number} of {file} is no calibration sample ({error}).") from error


def _rows(row: Any, folder: Path, place: str) -> Iterator[Sample]:
    images = row["images"] if "images" in row else [row["image"]]
    prompts = row["prompts"] if "prompts" in row else [row["prompt"]]
    for values in (images, prompts):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise TypeError("images and prompts must be lists of texts")
    for prompt in prompts:
        yield Sample(tuple(folder / name for name in images), prompt, place)
