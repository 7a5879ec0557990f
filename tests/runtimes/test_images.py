"""Images of strangers: odd ones work, bad ones and those that are not images give one sentence."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from runtimes.errors import UserError
from runtimes.images import ImageWarning, load_image

TURN = (0x0112, 3, 1, struct.pack("<H", 6) + b"\0\0")  # by 90°
EXIF = {
    "a rational of -1/0": [TURN, (0x829A, 10, 1, struct.pack("<ii", -1, 0))],
    "a signed rational in an unsigned tag": [TURN, (0x011A, 10, 1, struct.pack("<ii", -1, 0))],
    "two values where one is due": [TURN, (0x011A, 5, 2, struct.pack("<IIII", 72, 1, 72, 1))],
    "a rational of undefined type": [TURN, (0x927C, 5, 1, struct.pack("<II", 1, 3))],
    "two orientations": [(0x0112, 3, 2, struct.pack("<HH", 6, 6))],
    "an offset past the end": [TURN, (0x010F, 2, 60, struct.pack("<I", 99999))],
    "a loop": [TURN, (0x8769, 4, 1, struct.pack("<I", 8))],
    "text in a short": [TURN, (0x0100, 2, 4, b"abc\0")],
    "an unknown type": [TURN, (0x010F, 99, 1, b"abcd")],
    "infinity": [TURN, (0x011A, 12, 1, struct.pack("<d", float("inf")))],
}


def exif(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A block of EXIF with entries of tag, type, count and value."""
    offset, body, data = 8 + 2 + 12 * len(entries) + 4, struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in entries:
        short = len(value) <= 4
        place = value.ljust(4, b"\0") if short else struct.pack("<I", offset + len(data))
        body += struct.pack("<HHI", tag, kind, count) + place
        data += b"" if short else value
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0) + data


def jpeg(block: bytes) -> bytes:
    """60 × 40 pixels, green in the upper left quarter, red elsewhere."""
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    image.paste((20, 220, 40), (0, 0, 30, 20))
    content = encoded(image, "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG file; Pillow cannot write 16 bits per channel in color."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("name", EXIF)
def test_the_orientation_alone_counts(name: str) -> None:
    turned = load_image(jpeg(exif(EXIF[name])))
    assert turned.size == (40, 60)
    assert turned.getpixel((30, 10)) == pytest.approx((20, 220, 40), abs=12)  # the quarter went to the right


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", exif([TURN])[:24], b"Exif\0\0II*\0", exif([(0x0112, 2, 2, b"6\0")])]
)
def test_damaged_exif_says_nothing(block: bytes) -> None:
    assert load_image(jpeg(block)).size == (60, 40)


def test_formats_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (r) file\n"
    )
    with pytest.raises(UserError, match=r"page\.png is not a readable image; use PNG, JPEG"):
        load_image(tmp_path / "page.png")


def test_bombs_are_refused_beside_threads_with_small_images() -> None:
    bomb = png(12_000, 8_000, 1, 0, b"")
    small, stop, passed = encoded(Image.new("RGB", (8, 8)), "PNG"), threading.Event(), []

    def load_small() -> None:
        while not stop.is_set():
            load_image(small)

    threads = [threading.Thread(target=load_small) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            with pytest.raises(UserError, match="more than 89478485 pixels"):
                passed.append(load_image(bomb))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not passed


def test_pillow_images_and_arrays_are_bounded_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lazy = Image.open(io.BytesIO(encoded(Image.new("RGB", (60, 40)), "PNG")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(lazy, "load", lambda: pytest.fail("it was decoded"))
    for source in (lazy, np.zeros((40, 60, 3), np.uint8)):
        with pytest.raises(UserError, match="more than 1000 pixels"):
            load_image(source)


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert found.getpixel((5, 5)) == (255, 0, 0), kind


def test_transparent_palettes_keep_their_colors() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 0, 1])
    found = load_image(encoded(image, "PNG", transparency=b"\x00\x80"))
    assert np.asarray(found).tolist() == [[[10, 20, 30], [200, 100, 50]] * 2]


@pytest.mark.parametrize(
    "error", [KeyError("a"), struct.error("b"), MemoryError(), ZeroDivisionError("c"), EOFError()]
)
def test_whatever_a_decoder_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match="the image cannot be decoded: .+"):
        load_image(encoded(Image.new("RGB", (4, 4)), "PNG"))


@pytest.mark.parametrize("most", [255, 4095])
def test_dark_sixteen_bit_files_are_warned_of(most: int) -> None:
    values = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    gray = encoded(Image.fromarray(values), "PNG")
    big_endian = np.repeat(values[..., None], 3, 2).astype(">u2").reshape(8, -1)
    color = png(8, 8, 16, 2, b"".join(b"\0" + row.tobytes() for row in big_endian))
    for content in (gray, color, encoded(Image.fromarray(values), "TIFF")):
        with pytest.warns(ImageWarning, match="lowest 12 or fewer"):
            found = load_image(content)
        assert np.array_equal(np.asarray(found)[..., 0], values >> 8)


def test_bright_sixteen_bit_files_and_dark_eight_bit_files_are_not_warned_of() -> None:
    load_image(encoded(Image.fromarray(np.full((8, 8), 4096, np.uint16)), "PNG"))
    load_image(encoded(Image.new("RGB", (8, 8), (3, 3, 3)), "PNG"))


def test_heic_names_the_package_that_reads_it_and_works_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="HEIC image, which needs pillow-heif; run: pip install pillow-heif"):
        load_image(heic)

    def register() -> None:
        def factory(file: object, name: object) -> Image.Image:
            return Image.open(io.BytesIO(encoded(Image.new("RGB", (7, 5)), "PNG")))

        monkeypatch.setitem(Image.OPEN, "HEIF", (factory, lambda head: head[8:12] == b"heic"))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert load_image(heic).size == (7, 5)


def test_avif_is_read_or_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if features.check("avif"):
        assert load_image(encoded(Image.new("RGB", (16, 8)), "AVIF")).size == (16, 8)
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    with pytest.raises(UserError, match="AVIF image, which needs Pillow"):
        load_image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40))
