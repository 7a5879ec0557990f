"""Loading of images: accepted formats, orientation, and conversion to 8-bit RGB."""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
import warnings
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from runtimes.errors import UserError, first_line

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]
# Pillow reads more formats, some of which start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PLUGIN_FORMATS = ("AVIF", "HEIF")  # if Pillow was built with them, or a plug-in is registered
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # in folders of images
MAX_DARK_VALUE = 15  # of 255: the brightest pixel of 12-bit values in a 16-bit file
_TURNS: dict[Any, Image.Transpose] = {  # EXIF orientation → transposition
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Exceptions of Pillow for damaged tags, which are then ignored.
_BAD_TAGS = (
    OSError,
    SyntaxError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
)


class ImageWarning(UserWarning):
    """An image was loaded, but probably does not look as intended to the model."""


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, by their suffixes, in order."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def load_image(source: ImageSource, on_white: bool = False) -> Image.Image:
    """Load an upright 8-bit RGB image.

    The EXIF orientation is applied, and no other tag is read. 16-bit values are scaled to 8 bits.
    The alpha channel is dropped, as in the original, or the image is composed on white. Of several
    frames, the first is used.

    Args:
        source: a file, its bytes, a Pillow image, or an ``[H, W, 3]`` uint8 array.
        on_white: whether a transparent image is composed on white.

    Warns:
        ImageWarning: the file has 16 bits per channel but uses at most 12 of them, so it is dark.

    Raises:
        UserError: it is not an image in ``FORMATS``, is damaged, or has more than
            ``Image.MAX_IMAGE_PIXELS`` pixels according to its header.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(f"An image array must be uint8[H, W, 3], got {source.dtype}{list(source.shape)}.")
        _check_size(source.shape[1], source.shape[0], name)
        return Image.fromarray(source)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name, on_white)
        with _open(source, name) as image:
            return _upright_rgb(image, name, on_white)
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"The image file {name} does not exist.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(name) from error
    except Exception as error:  # Pillow's decoders and plug-ins raise exceptions of any type
        raise UserError(f"{name} cannot be decoded: {first_line(error)}.") from error


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    """Open an image and read its header."""
    try:
        return _open_registered(source)
    except UnidentifiedImageError as error:
        head = source[:64] if isinstance(source, bytes) else _head(Path(source))
        brand, brands = head[8:12], head[8:]
        is_container = head[4:8] == b"ftyp"
        if is_container and (b"avif" in brands or b"avis" in brands):
            raise UserError(
                f"{name} is an AVIF image, which needs Pillow 11.3 or later with AVIF;"
                " run: pip install --upgrade pillow."
            ) from error
        if is_container and brand in HEIC_BRANDS:
            if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif"):
                importlib.import_module("pillow_heif").register_heif_opener()
                return _open_registered(source)
            raise UserError(
                f"{name} is a HEIC image, which needs pillow-heif; run: pip install pillow-heif."
            ) from error
        raise UserError(f"{name} is not a readable image; use {', '.join(FORMATS)}, AVIF or HEIC.") from error


def _open_registered(source: str | Path | bytes) -> Image.Image:
    Image.init()  # registers Pillow's own formats, once
    formats = (*FORMATS, *(name for name in PLUGIN_FORMATS if name in Image.OPEN))
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _head(file: Path) -> bytes:
    with file.open("rb") as handle:
        return handle.read(64)


def _check_size(width: int, height: int, name: str) -> None:
    """Raise UserError if an image has more pixels than Pillow's limit, which may be None."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)


def _too_large(name: str) -> UserError:
    return UserError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, too many to decode safely.")


def _upright_rgb(image: Image.Image, name: str, on_white: bool) -> Image.Image:
    _check_size(*image.size, name)
    wide = _stores_sixteen_bits(image)
    image.load()
    _check_size(*image.size, name)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    image = _to_rgb(image, on_white)
    if wide and np.asarray(image).max() <= MAX_DARK_VALUE:
        warnings.warn(
            f"{name} has 16 bits per channel but uses only the lowest 12 or fewer, so the model sees a"
            " dark picture; scale its values to 0 to 65535.",
            ImageWarning,
            stacklevel=3,
        )
    return image


def _stores_sixteen_bits(image: Image.Image) -> bool:
    """Whether Pillow keeps the upper byte of 16-bit values; call this before ``image.load``."""
    raw_modes = [
        part
        for tile in getattr(image, "tile", [])
        for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
        if isinstance(part, str)
    ]
    return image.mode.startswith("I;16") or any("16" in mode for mode in raw_modes)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition for the EXIF orientation; None if there is no readable orientation.

    Pillow's ``exif_transpose`` rewrites all other tags, which fails for tags of many cameras.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except _BAD_TAGS:
        return None


def _to_rgb(image: Image.Image, on_white: bool) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no defined white level; convert it to 8 or 16 bits")
    if on_white and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colors; Pillow warns of a direct conversion
    return image.convert("RGB")
