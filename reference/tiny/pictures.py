"""Rendered pictures for the tiny model: a number in one half, one to three shapes in the other.

A seed determines a picture and its scene (the objects and their positions). Questions, answers and
the dense targets of the first training stage are computed from the scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CANVAS = 128  # drawing units; pictures have 1.25 to 3 pixels per unit
COLORS = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 30),
    "purple": (150, 50, 180),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
COLUMNS = ("left", "middle", "right")
HALVES = ("top", "bottom")

TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
    "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10",
    "cmtt10", "cmti10",
)  # fmt: skip
HELD_OUT_FONTS = ("pillow", "cmss10", "DejaVuSansMono-Bold")
# Positions are drawn from stripes of the free space; training and held-out set share no stripe.
STRIPES, HELD_OUT_STRIPES = 12, (3, 8)


@dataclass(frozen=True)
class SceneObject:
    """A digit or a shape: name, color, box in canvas units, and its order from left to right."""

    name: str
    color: str
    box: tuple[float, float, float, float]
    order: int  # digits: 0 to 2 within the number; shapes: column


@dataclass(frozen=True)
class Scene:
    """The content of a picture: a number and shapes."""

    number: str
    number_color: str
    number_half: str
    shapes: tuple[SceneObject, ...]
    digits: tuple[SceneObject, ...]


def draw_scene(seed: Sequence[int], held_out: bool = False) -> tuple[Image.Image, Scene]:
    """Draw the picture of a seed, RGB, 160 to 384 pixels square; returns it with its scene.

    Args:
        seed: any integers; a seed always gives the same picture.
        held_out: use the fonts and positions that training never uses.
    """
    rng = np.random.default_rng(list(seed))
    scale = float(rng.uniform(1.25, 3.0))
    side = round(CANVAS * scale)
    dark = rng.random() < 0.3
    base = rng.integers(0, 50) if dark else rng.integers(205, 256)
    background = np.clip(base + rng.integers(-12, 13, size=3), 0, 255)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in background))
    pen = ImageDraw.Draw(image)
    half = int(rng.integers(2))
    number, color, digits = _draw_number(pen, rng, scale, half, held_out)
    shapes = _draw_shapes(pen, rng, scale, 1 - half, held_out)
    return image, Scene(number, color, HALVES[half], tuple(shapes), tuple(digits))


def _offset(rng: np.random.Generator, room: float, held_out: bool) -> float:
    """Draw a position in [0, room], from a stripe of training or of the held-out set."""
    train = [stripe for stripe in range(STRIPES) if stripe not in HELD_OUT_STRIPES]
    stripe = rng.choice(HELD_OUT_STRIPES if held_out else train)
    return float((stripe + rng.random()) / STRIPES * room)


def _color(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    name = str(rng.choice(list(COLORS)))
    red, green, blue = np.clip(np.array(COLORS[name]) + rng.integers(-14, 15, size=3), 0, 255)
    return name, (int(red), int(green), int(blue))


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "pillow":
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType, which drawing text needs.")
        return font
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _draw_number(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, scale: float, half: int, held_out: bool
) -> tuple[str, str, list[SceneObject]]:
    count = int(rng.integers(1, 4))
    first = rng.integers(1 if count > 1 else 0, 10)
    number = "".join(str(d) for d in [first, *rng.integers(0, 10, size=count - 1)])
    name, rgb = _color(rng)
    font = _font(
        str(rng.choice(HELD_OUT_FONTS if held_out else TRAIN_FONTS)),
        round(float(rng.uniform(32, 50)) * scale),
    )
    spacing = float(rng.uniform(0, 3)) * scale
    stroke = int(rng.integers(0, 2))
    advances = [font.getlength(digit) + spacing for digit in number]
    _, top, _, bottom = font.getbbox("0123456789")
    height, width = bottom - top, sum(advances)
    side, margin = CANVAS * scale, 3 * scale
    x = margin + _offset(rng, side - 2 * margin - width, held_out)
    y = half * side / 2 + margin + _offset(rng, side / 2 - 2 * margin - height, held_out)
    digits = []
    for order, (digit, advance) in enumerate(zip(number, advances, strict=True)):
        pen.text((x, y - top), digit, font=font, fill=rgb, stroke_width=stroke)
        box = (x / scale, y / scale, (x + advance) / scale, (y + height) / scale)
        digits.append(SceneObject(digit, name, box, order))
        x += advance
    return number, name, digits


def _draw_shapes(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, scale: float, half: int, held_out: bool
) -> list[SceneObject]:
    columns = sorted(int(c) for c in rng.permutation(3)[: rng.integers(1, 4)])
    width, height = CANVAS / 3, CANVAS / 2
    shapes = []
    for column in columns:
        kind, (name, rgb) = str(rng.choice(SHAPES)), _color(rng)
        radius = float(rng.uniform(10, 18))
        x = column * width + radius + 1 + _offset(rng, width - 2 * radius - 2, held_out)
        y = half * height + radius + 2 + _offset(rng, height - 2 * radius - 4, held_out)
        box = (x - radius, y - radius, x + radius, y + radius)
        _draw_shape(pen, kind, tuple(v * scale for v in (x, y, radius)), rgb)
        shapes.append(SceneObject(kind, name, box, column))
    return shapes


def _draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, place: tuple[float, ...], rgb: tuple[int, int, int]
) -> None:
    x, y, r = place
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
    elif kind == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=rgb)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=rgb)
    else:
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, r, 0.42 * r)
        pen.polygon(
            [(x + q * np.cos(t), y + q * np.sin(t)) for q, t in zip(radii, turns, strict=True)], fill=rgb
        )
