"""Each operator of the interpreter against coremltools' own inference of values, or against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.quantized_program import qd
from runtimes.backends.mil.operators import LARGE, OPERATORS, scaled_dot_product_attention

mil = pytest.importorskip("dsvl_export.compilers.mil.context", reason="coremltools is not installed here")
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, types  # noqa: E402

from dsvl_export.compilers.mil.functions import TARGET  # noqa: E402

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


X, Y, POSITIVE = floats(2, 3, 4), floats(2, 3, 4), np.abs(floats(2, 3, 4)) + 0.1
CODES = RANDOM.integers(-8, 8, (6, 8)).astype(np.int8)
INDICES = RANDOM.integers(0, 16, (6, 8)).astype(np.uint8)
SLICE: dict[str, Any] = {"begin": ints(0, -2, 1), "end": ints(0, 3, 3), "begin_mask": [True, False, False],
                         "end_mask": [True, False, False]}  # fmt: skip

# Operator and its arguments; coremltools infers the value of each.
INFERRED: list[tuple[str, dict[str, Any]]] = [
    ("abs", {"x": X}),
    ("add", {"x": X, "y": Y}),
    ("add", {"x": X, "y": floats(4)}),
    ("sub", {"x": X, "y": Y}),
    ("mul", {"x": X, "y": Y}),
    ("real_div", {"x": X, "y": POSITIVE}),
    ("maximum", {"x": X, "y": Y}),
    ("greater", {"x": X, "y": Y}),
    ("cast", {"x": X * 100, "dtype": "int32"}),
    ("cast", {"x": rounded(X), "dtype": "fp16"}),
    ("cast", {"x": ints(0, 1, 5), "dtype": "fp32"}),
    ("cast", {"x": X > 0, "dtype": "fp16"}),
    ("identity", {"x": X}),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(1e-6)}),
    ("reduce_max", {"x": X, "axes": ints(-1), "keep_dims": True}),
    ("reduce_mean", {"x": X, "axes": ints(0, 2), "keep_dims": False}),
    ("reshape", {"x": X, "shape": ints(4, 6)}),
    ("reshape", {"x": X, "shape": ints(2, 1, -1)}),
    ("reshape", {"x": X, "shape": ints(6, 1, 0)}),
    ("transpose", {"x": X, "perm": ints(2, 0, 1)}),
    ("expand_dims", {"x": X, "axes": ints(1)}),
    ("split", {"x": X, "axis": 2, "num_splits": 2}),
    ("split", {"x": X, "axis": 1, "split_sizes": ints(1, 2)}),
    ("concat", {"values": [X, Y], "axis": -1}),
    ("gather", {"x": X, "indices": ints(2, 0), "axis": 1}),
    ("gather", {"x": floats(7, 4), "indices": np.array([[1, 6]], np.int32), "axis": 0}),
    ("slice_by_index", {"x": X, **SLICE}),
    ("slice_by_index", {"x": X, "begin": ints(0, 1, 0), "end": ints(2, 1, 3), "squeeze_mask": [False, True, False]}),
    ("slice_by_index", {"x": X, "begin": ints(0, 0, 3), "end": ints(2, 3, 0), "stride": ints(1, 1, -1)}),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}),
    ("matmul", {"x": X, "y": floats(4, 5)}),
    ("linear", {"x": X, "weight": floats(5, 4), "bias": floats(5)}),
    ("gelu", {"x": X * 3, "mode": "EXACT"}),
    ("gelu", {"x": X * 3, "mode": "TANH_APPROXIMATION"}),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments", INFERRED, ids=[name for name, _ in INFERRED])
def test_as_coremltools_infers(name: str, arguments: dict[str, Any]) -> None:
    with Function({}, opset_version=TARGET):
        inferred = getattr(mb, name)(**arguments)
    several = inferred if isinstance(inferred, (list, tuple)) else [inferred]
    expected = [np.asarray(item.val, np.float32) for item in several]
    assert all(item.val is not None for item in several)
    found = OPERATORS[name](**arguments)
    found = found if isinstance(found, list) else [found]
    for one, other in zip(found, expected, strict=True):
        assert np.asarray(one).shape == other.shape
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=2e-6, atol=2e-6)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


HEADS = (floats(2, 3, 5, 8), floats(2, 3, 7, 8), floats(2, 3, 7, 8))
IMAGE, KERNEL = floats(1, 3, 9, 9), floats(4, 3, 3, 3)
# What coremltools does not infer: operator, its arguments, and the same in PyTorch.
COMPUTED: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("layer_norm", {"x": X, "axes": ints(-1), "gamma": floats(4), "beta": floats(4), "epsilon": 1e-5},
     lambda x, axes, gamma, beta, epsilon: F.layer_norm(x, (4,), gamma, beta, epsilon)),
    ("scaled_dot_product_attention", dict(zip(("query", "key", "value"), HEADS, strict=True)), attention),
    ("scaled_dot_product_attention",
     {**dict(zip(("query", "key", "value"), HEADS, strict=True)), "attn_mask": floats(1, 1, 5, 7)}, attention),
    ("scaled_dot_product_attention",
     {**dict(zip(("query", "key", "value"), HEADS, strict=True)), "attn_mask": np.tri(5, 7) > 0}, attention),
    ("conv", {"x": IMAGE, "weight": KERNEL, "bias": floats(4), "strides": ints(2, 2), "pad_type": "custom",
              "pad": ints(1, 1, 1, 1)},
     lambda x, weight, bias, strides, pad_type, pad: F.conv2d(x, weight, bias, stride=2, padding=1)),
    ("conv", {"x": IMAGE, "weight": KERNEL, "strides": ints(3, 3), "pad_type": "custom", "pad": ints(0, 0, 0, 0)},
     lambda x, weight, strides, pad_type, pad: F.conv2d(x, weight, stride=3)),
    ("pad", {"x": X, "pad": ints(0, 0, 1, 2, 3, 0), "mode": "constant", "constant_val": np.float32(0.5)},
     lambda x, pad, mode, constant_val: F.pad(x, (3, 0, 1, 2, 0, 0), value=0.5)),
    ("slice_update", {"x": X, "update": floats(2, 2, 4), "begin": ints(0, 1, 0), "end": ints(0, 3, 0),
                      "begin_mask": [True, False, True], "end_mask": [True, False, True]},
     lambda x, update, **_: x.slice_scatter(update, 1, 1, 3)),
    ("quantize", {"input": X * 40, "scale": np.float32(0.3), "output_dtype": "int8"},
     lambda input, scale, output_dtype: qd.quantize_per_tensor(input, 0.3, 0, -128, 127, torch.int8)),
    ("quantize", {"input": X, "scale": np.array([0.1, 0.2, 0.3], np.float32), "output_dtype": "int8", "axis": 1,
                  "zero_point": np.array([1, 2, 3], np.int8)},
     lambda input, scale, output_dtype, axis, zero_point: qd.quantize_per_channel(
         input, scale, zero_point, axis, -128, 127, torch.int8)),
    ("silu", {"x": X}, lambda x: F.silu(x)),
    ("dequantize", {"input": CODES, "scale": np.float32(0.3)}, lambda input, scale: input.float() * 0.3),
    ("dequantize", {"input": CODES, "scale": floats(6), "axis": 0},
     lambda input, scale, axis: input.float() * scale[:, None]),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, reference", COMPUTED, ids=[name for name, *_ in COMPUTED])
def test_as_pytorch_computes(name: str, arguments: dict[str, Any], reference: Callable[..., Tensor]) -> None:
    tensors = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in arguments.items()
    }
    expected = reference(**tensors).numpy()
    found = OPERATORS[name](**arguments)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2e-5, atol=2e-6)


def test_decompression_is_coremltools() -> None:
    """Blocks along both axes, with and without offsets; palettes for groups of rows."""
    scale, offset = rounded(np.abs(floats(3, 2))), RANDOM.integers(-3, 3, (3, 2)).astype(np.int8)
    for more in ({}, {"offset": offset}):
        with Function({}, opset_version=TARGET):
            four_bit = {key: value.astype(types.np_int4_dtype) for key, value in more.items()}
            var = mb.constexpr_blockwise_shift_scale(
                data=CODES.astype(types.np_int4_dtype), scale=scale.astype(np.float16), **four_bit
            )
            expected = var.op.materialized_val_inference().astype(np.float32)
        found = OPERATORS["constexpr_blockwise_shift_scale"](data=CODES, scale=scale, **more)
        assert np.array_equal(rounded(found), expected)
    lut = rounded(floats(3, 2, 16, 1))
    with Function({}, opset_version=TARGET):
        var = mb.constexpr_lut_to_dense(
            indices=INDICES.astype(types.np_uint4_dtype), lut=lut.astype(np.float16)
        )
        expected = var.op.materialized_val_inference().astype(np.float32)
    assert np.array_equal(OPERATORS["constexpr_lut_to_dense"](indices=INDICES, lut=lut), expected)


def test_large_attention_is_computed_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = floats(1, 3, 5, 7)
    whole = scaled_dot_product_attention(*HEADS, mask)
    monkeypatch.setattr("runtimes.backends.mil.operators.LARGE", 10)
    np.testing.assert_allclose(scaled_dot_product_attention(*HEADS, mask), whole, rtol=1e-6)
    assert LARGE > 10


def test_every_operator_is_tested() -> None:
    tested = {name for name, _ in INFERRED} | {name for name, *_ in COMPUTED}
    assert set(OPERATORS) == tested | {"constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"}


@pytest.mark.parametrize("name, arguments", [
    ("conv", {"x": IMAGE, "weight": KERNEL, "groups": 3}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("pad", {"x": X, "pad": ints(1, 1), "mode": "reflect"}),
    ("gather", {"x": X, "indices": ints(0), "batch_dims": 1}),
    ("concat", {"values": [X, Y], "axis": 0, "interleave": True}),
])  # fmt: skip
def test_forms_that_are_not_known_are_errors(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError):
        OPERATORS[name](**arguments)
