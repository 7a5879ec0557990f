"""Preprocessing against transformers' Pillow processor, and the original's rules where they differ."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from runtimes.preprocess import PreprocessSpec, preprocess, resize_and_pad

SPEC = PreprocessSpec(384, 14, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), (122, 117, 104), 1 / 255, True)
PICTURES = {"astronaut": data.astronaut, "coffee": data.coffee, "cat": data.chelsea, "rocket": data.rocket}


def oracle(image: Image.Image) -> np.ndarray:
    processor = DeepseekVLImageProcessorPil(
        image_mean=SPEC.mean, image_std=SPEC.std, min_size=14, size={"height": 384, "width": 384}
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("name", PICTURES)
def test_real_photographs(name: str) -> None:
    """Equal where both round a side to the same length; cropped so that they do."""
    image = Image.fromarray(PICTURES[name]())
    width, height = image.size
    side = min(width, height)
    image = image.crop((0, 0, side, side * 3 // 4 // 16 * 16)).resize((384, 288))
    assert np.abs(preprocess(image, SPEC) - oracle(image)).max() < 1e-6
    square = image.resize((500, 500))
    assert np.abs(preprocess(square, SPEC) - oracle(square)).max() < 1e-6


def test_the_original_cuts_where_transformers_rounds() -> None:
    """500 × 333 at 384: the original makes int(255.744) = 255 rows, transformers 256."""
    image = Image.fromarray(data.astronaut()).resize((500, 333))
    square = resize_and_pad(image, SPEC)
    top = (384 - 255) // 2
    content = np.asarray(image.resize((384, 255), Image.Resampling.BICUBIC))
    assert np.array_equal(square[top : top + 255], content)
    assert (square[:top] == SPEC.background).all()
    assert (square[top + 255 :] == SPEC.background).all()
    assert np.abs(preprocess(image, SPEC) - oracle(image)).max() > 0.1
