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
from runtimes.images import image_files, load_image

BUNDLED_DATA = Path(__file__).parent / "bundled" / "questions.jsonl"
# Questions about a folder's images; they alternate.
PROMPTS = (
    "Describe the picture.",
    "What is in this image? Answer in one sentence.",
    "Is there any text or number in the picture? If so, read it.",
)
MAX_SKIPPED = 0.1  # share of samples with unreadable images


@dataclass(frozen=True)
class Sample:
    """One request: image files and a question about them; ``origin`` is for error messages."""

    images: tuple[Path, ...]
    question: str
    origin: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the images' bytes and the question, whatever the file names."""
        parts = [hashlib.sha256(image.read_bytes()).hexdigest() for image in self.images]
        return hashlib.sha256("\n".join([*parts, self.question]).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationData:
    """Samples in a fixed order, and the images that were skipped because they cannot be read."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()


def load_data(data: str, count: int, seed: int = 0) -> CalibrationData:
    """Load calibration samples.

    Args:
        data: ``bundled``, a folder of images, or a JSONL file. A line of the file has ``image`` or
            ``images`` (paths relative to the file) and ``prompt`` or ``prompts``.
        count: the most samples to load.
        seed: of the random selection.

    Raises:
        UserError: there are no images, a line is not valid, or too many images are unreadable.
    """
    if data == "bundled":
        rows = list(_read_lines(BUNDLED_DATA))
    else:
        place = Path(data).expanduser()
        if not place.exists():
            raise UserError(
                f"There is no calibration data {data}; give a folder of images, a JSONL file, or 'bundled'."
            )
        rows = _read_folder(place) if place.is_dir() else list(_read_lines(place))
    if not rows:
        raise UserError(f"{data} has no images to calibrate with.")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    chosen = [rows[index] for index in sorted(order)]
    origins = {image: row.origin for row in chosen for image in row.images}
    unreadable = {image: error for image, origin in origins.items() if (error := _read_error(image, origin))}
    kept = tuple(row for row in chosen if not unreadable.keys() & set(row.images))
    if len(kept) < (1 - MAX_SKIPPED) * len(chosen):
        first = next(iter(unreadable.values()))
        raise UserError(f"{len(unreadable)} images of {data} cannot be read, which is too many: {first}")
    # Duplicates would count twice, and could be in two parts of a split.
    distinct = {row.digest: row for row in kept}
    return CalibrationData(tuple(distinct.values()), tuple(sorted(map(str, unreadable))))


def _read_error(image: Path, origin: str) -> str | None:
    """Return why an image cannot be read; None if it can."""
    try:
        load_image(image)
    except UserError as error:
        return str(error).removesuffix(".") + origin + "."
    return None


def _read_folder(folder: Path) -> list[Sample]:
    return [Sample((file,), PROMPTS[index % len(PROMPTS)]) for index, file in enumerate(image_files(folder))]


def _read_lines(file: Path) -> Iterator[Sample]:
    for number, row in read_json_lines(file, "calibration data"):
        try:
            yield from _parse_row(row, file.parent, f", line {number} of {file}")
        except (KeyError, TypeError) as error:
            raise UserError(f"Line {number} of {file} is not a calibration sample ({error}).") from error


def _parse_row(row: Any, folder: Path, origin: str) -> Iterator[Sample]:
    images = row["images"] if "images" in row else [row["image"]]
    prompts = row["prompts"] if "prompts" in row else [row["prompt"]]
    for values in (images, prompts):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise TypeError("images and prompts must be lists of strings")
    for prompt in prompts:
        yield Sample(tuple(folder / name for name in images), prompt, origin)
