"""Image preprocessing with the arithmetic of the original ``VLMImageProcessor``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from runtimes.images import ImageSource, load_image

# Pillow's filters, indexed by the number of ``resample`` in a processor config.
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class PreprocessSpec:
    """Constants of the preprocessing.

    Args:
        image_size: side of the square output, in pixels.
        min_size: lower bound of either side after resizing, in pixels.
        mean: mean per RGB channel, of values in [0, 1].
        std: standard deviation per RGB channel, of values in [0, 1].
        background: RGB of the padding, ``int(mean * 255)`` or 127.
        rescale_factor: factor of the values 0 to 255.
        do_normalize: whether ``(x - mean) / std`` is part of the preprocessing (in the hybrid model
            it is part of the vision encoder).
        resample: Pillow's filter for resizing, one of ``RESAMPLING``.
        on_white: whether transparent images are composed on white; otherwise their alpha channel
            is dropped.
    """

    image_size: int
    min_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: tuple[int, int, int]
    rescale_factor: float
    do_normalize: bool
    resample: str = "bicubic"
    on_white: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PreprocessSpec:
        """Read the object of a manifest, which its schema has validated."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
        return cls(**values)


def resize_and_pad(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """Resize the longest side to N with antialiasing and center the image on the background.

    Returns:
        ``[N, N, 3]`` uint8.
    """
    width, height = image.size
    longest = max(width, height)
    new_height = max(int(height / longest * spec.image_size), spec.min_size)
    new_width = max(int(width / longest * spec.image_size), spec.min_size)
    image = image.resize((new_width, new_height), Image.Resampling[spec.resample.upper()])
    if new_width == new_height:
        return np.asarray(image)
    side = max(new_width, new_height)
    square = Image.new("RGB", (side, side), spec.background)
    square.paste(image, ((side - new_width) // 2, (side - new_height) // 2))
    return np.asarray(square)


def to_pixel_values(square: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Rescale a square ``[N, N, 3]`` uint8 and, if the spec says so, normalize it.

    Returns:
        ``[3, N, N]`` float32.
    """
    pixels = (square.astype(np.float64) * spec.rescale_factor).astype(np.float32)
    if spec.do_normalize:
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def preprocess(source: ImageSource, spec: PreprocessSpec) -> np.ndarray:
    """Load an image and compute its pixel values ``[3, N, N]`` float32.

    Raises:
        UserError: the image is not readable; see ``load_image``.
    """
    return to_pixel_values(resize_and_pad(load_image(source, spec.on_white), spec), spec)
