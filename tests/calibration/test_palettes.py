"""4-bit palettes: the 16 numbers that stand for a group of rows, and what a program makes of them."""

from __future__ import annotations

import torch

from calibration.precision_plan import LayerPrecision
from calibration.quantized_program import dequantize_weight, fake_quantize_weight, quantize_weight
from calibration.quantized_weights import find_palettes, find_weight_scale

PRECISION = LayerPrecision.parse("palette4-g4")


def test_every_number_becomes_the_nearest_entry() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    palettes = find_palettes(weight, 4)
    assert palettes.shape == (2, 16)
    assert (palettes.diff(dim=1) >= 0).all()
    codes = quantize_weight(weight, palettes, PRECISION)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 16
    distances = (weight.reshape(2, -1, 1) - palettes[:, None]).abs()  # [groups, values, entries]
    dense = dequantize_weight(codes, palettes, PRECISION, torch.float32)
    assert torch.allclose((weight - dense).abs().reshape(2, -1), distances.min(dim=-1).values)


def test_entries_are_the_means_of_what_they_stand_for() -> None:
    """Lloyd's condition, which no better palette of the same assignment can exist by."""
    torch.manual_seed(1)
    weight = torch.randn(4, 512)
    palettes = find_palettes(weight, 4)
    codes = quantize_weight(weight, palettes, PRECISION).long()
    for entry in range(16):
        members = weight[codes == entry]
        assert torch.allclose(members.mean(), palettes[0, entry], atol=2e-3)


def test_a_palette_beats_sixteen_equal_steps() -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 256)
    steps = (weight / weight.abs().max() * 7.5).round() * weight.abs().max() / 7.5
    error = (
        (fake_quantize_weight(weight, find_weight_scale(weight, PRECISION), PRECISION) - weight)
        .square()
        .mean()
    )
    assert error < 0.6 * (steps - weight).square().mean()


def test_few_values_are_kept_exactly() -> None:
    weight = torch.tensor([-1.0, 0.5, 2.0]).repeat(4, 20)
    assert torch.allclose(
        fake_quantize_weight(weight, find_palettes(weight, 4), PRECISION), weight, atol=1e-6
    )
    assert torch.equal(
        fake_quantize_weight(torch.zeros(4, 8), find_palettes(torch.zeros(4, 8), 4), PRECISION),
        torch.zeros(4, 8),
    )
