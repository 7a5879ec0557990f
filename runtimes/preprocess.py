"""Image preprocessing, equal to the original's arithmetic (``VLMImageProcessor``), in numpy and Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from runtimes.images import ImageSource, load_image

# Pillow's filters by the numbers that ``resample`` has in processors' files.
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class PreprocessSpec:
    """Constants of the preprocessing.

    Args:
        image_size: side of the square output, pixels.
        min_size: lower bound of either side after resizing, pixels.
        mean, std: per channel, of RGB in [0, 1].
        background: RGB of the padding, ``int(mean * 255)`` or 127.
        rescale_factor: multiplies 0..255 values.
        do_normalize: whether ``(x - mean) / std`` is part of the preprocessing (it is inside the
            vision encoder of the hybrid model).
        resample: Pillow's filter for resizing, one of ``RESAMPLING``.
        on_white: whether transparent images are put on white; else their alpha channel is dropped.
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
        """Of the object in a manifest, which its schema has checked."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
        return cls(**values)


def resize_and_pad(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """``[N, N, 3]`` uint8: longest side to N by the filter with antialias, centred on the background."""
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
    """``[N, N, 3]`` uint8 → ``[3, N, N]`` float32, rescaled and, where the spec says so, normalised."""
    pixels = (square.astype(np.float64) * spec.rescale_factor).astype(np.float32)
    if spec.do_normalize:
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def preprocess(source: ImageSource, spec: PreprocessSpec) -> np.ndarray:
    """``[3, N, N]`` float32 pixel values of any image; see ``load_image`` for what is accepted."""
    return to_pixel_values(resize_and_pad(load_image(source, spec.on_white), spec), spec)
