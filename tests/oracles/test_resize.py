"""The constant resize matrices against torch's and Pillow's own resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reference.model.resize import bilinear_matrix, resize


@pytest.mark.parametrize(("source", "target"), [(1024, 384), (128, 64), (112, 28), (50, 33)])
def test_antialiased_bilinear(source: int, target: int) -> None:
    """Equal to torch's (torchvision's Resize calls it) and to Pillow's on float images."""
    image = torch.rand(1, 3, source, source, generator=torch.Generator().manual_seed(0))
    ours = resize(image, bilinear_matrix(source, target, antialias=True))
    theirs = F.interpolate(image, (target, target), mode="bilinear", antialias=True)
    assert (ours - theirs).abs().max() < 1e-5
    for channel in range(3):
        plane = Image.fromarray(image[0, channel].numpy(), mode="F")
        pillow = np.asarray(plane.resize((target, target), Image.Resampling.BILINEAR))
        assert np.abs(ours[0, channel].numpy() - pillow).max() < 1e-5


@pytest.mark.parametrize(("source", "target"), [(64, 96), (8, 32), (14, 16), (5, 5)])
def test_plain_bilinear(source: int, target: int) -> None:
    image = torch.rand(2, 4, source, source, generator=torch.Generator().manual_seed(0))
    ours = resize(image, bilinear_matrix(source, target, antialias=False))
    theirs = F.interpolate(image, (target, target), mode="bilinear", align_corners=False)
    assert (ours - theirs).abs().max() < 1e-5
