"""Image preprocessing, equal to the original's arithmetic (``VLMImageProcessor``), in numpy and Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtimes.errors import UserError

# Pillow's filters by the numbers that ``resample`` has in processors' files.
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]


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
    """

    image_size: int
    min_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: tuple[int, int, int]
    rescale_factor: float
    do_normalize: bool
    resample: str = "bicubic"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PreprocessSpec:
        """Of the object in a manifest, which its schema has checked."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
        return cls(**values)


def load_image(source: ImageSource) -> Image.Image:
    """An upright 8-bit RGB image from a file, bytes, a Pillow image or an ``[H, W, 3]`` uint8 array.

    EXIF orientation is applied; 16-bit greys are scaled to 8 bits; alpha is dropped, as in the original.

    Raises:
        UserError: it is no image, is damaged, or is too large to decode safely.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the given image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(f"An image array must be uint8[H, W, 3], got {source.dtype}{list(source.shape)}.")
        return Image.fromarray(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd palettes and cut EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _upright_rgb(source)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _upright_rgb(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"There is no image file {name}.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image that Pillow can read.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, too many to decode safely."
        ) from error
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # of Pillow's many decoders
        raise UserError(f"{name} cannot be decoded: {error}.") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no defined white; convert it to 8 or 16 bits")
    return image.convert("RGB")


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
    return to_pixel_values(resize_and_pad(load_image(source), spec), spec)
