"""Odd and bad images: they work, or are refused with a reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import UserError
from runtimes.images import load_image
from runtimes.preprocess import PreprocessSpec, preprocess, resize_and_pad

SPEC = PreprocessSpec(128, 14, (0.5,) * 3, (0.5,) * 3, (127, 127, 127), 1 / 255, False)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def rgb() -> Image.Image:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30] = (250, 10, 10)
    pixels[20:, 30:] = (10, 240, 20)
    return Image.fromarray(pixels)


def test_exif_orientation_is_applied(rgb: Image.Image) -> None:
    """A phone stores the sensor's picture and a note to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    turned = load_image(encoded(rgb.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif))
    assert turned.size == rgb.size
    assert np.array_equal(np.asarray(turned), np.asarray(rgb))


def test_palette_gray_cmyk_and_alpha(rgb: Image.Image) -> None:
    palette = load_image(encoded(rgb.quantize(8), "PNG"))
    assert np.abs(np.asarray(palette).astype(int) - np.asarray(rgb)).max() < 8
    gray = np.asarray(load_image(encoded(rgb.convert("L"), "PNG")))
    assert (gray[..., 0] == gray[..., 1]).all()
    cmyk = load_image(encoded(rgb.convert("CMYK"), "TIFF"))
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(rgb)).max() < 8
    transparent = rgb.convert("RGBA")
    transparent.putalpha(0)
    # The original converts with Pillow, which drops alpha and keeps the colors below it.
    assert np.array_equal(np.asarray(load_image(encoded(transparent, "PNG"))), np.asarray(rgb))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    found = np.asarray(load_image(encoded(Image.fromarray(ramp), "PNG")))[..., 0]
    assert np.array_equal(found, ramp >> 8)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="32-bit pixels have no defined white"):
        load_image(tmp_path / "float.tiff")


@pytest.mark.parametrize(
    ("width", "height", "content"), [(1, 1, (128, 128)), (20000, 10, (128, 14)), (3, 900, (14, 128))]
)
def test_extreme_sizes(width: int, height: int, content: tuple[int, int]) -> None:
    image = Image.new("RGB", (width, height), (200, 0, 0))
    square = resize_and_pad(image, SPEC)
    assert square.shape == (128, 128, 3)
    red = (square == (200, 0, 0)).all(-1)
    assert (red.any(0).sum(), red.any(1).sum()) == content
    assert (square[~red] == 127).all()
    assert preprocess(image, SPEC).dtype == np.float32


def test_normalization_is_the_specs() -> None:
    spec = PreprocessSpec(8, 1, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), (0, 0, 0), 1 / 255, True)
    pixels = preprocess(np.full((8, 8, 3), 51, np.uint8), spec)
    assert np.allclose(pixels[:, 0, 0], [0.2, 0.0, -0.05], atol=1e-7)


def test_what_is_no_image_is_refused(tmp_path: Path, rgb: Image.Image) -> None:
    (tmp_path / "text.png").write_text("no image at all")
    with pytest.raises(UserError, match=r"text\.png is not a readable image"):
        load_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="The image file .* does not exist"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="The image file .* does not exist"):
        load_image(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(encoded(noise, "PNG")[:900])
    with pytest.raises(UserError, match=r"cut\.png cannot be decoded"):
        load_image(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"must be uint8\[H, W, 3\]"):
        load_image(np.zeros((4, 4), np.uint8))


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, rgb: Image.Image) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="more than 1000 pixels"):
        load_image(encoded(rgb, "PNG"))
