"""Operators of MIL in numpy: one function per operator, and a table of them.

Arrays of half precision are passed as float32 with values that half precision can represent; the
interpreter rounds an operator's outputs to the types that the package declares. Parameters have the
names of coremltools' ``converters/mil/mil/ops/defs``, which defines each operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any  # a numpy array; the interpreter checks the outputs against the declared types
LARGE = 1 << 26  # attention scores above which the heads are computed one after the other


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return ``x @ weight.T + bias``."""
    out = x @ weight.T
    return out if bias is None else out + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Return the matrix product of the last two axes."""
    return np.matmul(x.swapaxes(-1, -2) if transpose_x else x, y.swapaxes(-1, -2) if transpose_y else y)


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Array:
    """Return a 2D convolution ``[B, C, H, W]``."""
    if pad_type not in ("custom", "valid") or list(dilations) != [1, 1] or groups != 1:
        raise NotImplementedError(
            f"conv with {pad_type} padding, dilations {list(dilations)}, groups {groups}"
        )
    top, bottom, left, right = pad if pad_type == "custom" else (0, 0, 0, 0)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]  # [B, C, h, w, kh, kw]
    out = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    return out if bias is None else out + bias.reshape(-1, 1, 1)


def layer_norm(
    x: Array,
    axes: Sequence[int],
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Normalize over ``axes`` to mean 0 and variance 1, then scale and shift."""
    normalized = tuple(axes)
    centered = x - x.mean(axis=normalized, keepdims=True)
    out = centered / np.sqrt(np.square(centered).mean(axis=normalized, keepdims=True) + epsilon)
    out = out if gamma is None else out * gamma
    return out if beta is None else out + beta


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Return GELU, exact or in its tanh approximation."""
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x)))
    if mode != "EXACT":
        raise NotImplementedError(f"gelu in the mode {mode}")
    return 0.5 * x * (1 + _erf(x.astype(np.float64) / np.sqrt(2)))


def _erf(x: Array) -> Array:
    """Return the error function by Abramowitz and Stegun 7.1.26; the error is at most 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    terms = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.sign(x) * (1 - terms * np.exp(-x * x))


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x / (1 + np.exp(-x))


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """Return attention ``[..., S, Dh]``; a boolean mask is true where a key is visible."""
    shape = (*query.shape[:-1], key.shape[-2])
    mask = None if attn_mask is None else np.broadcast_to(attn_mask, shape)
    if np.prod(shape) > LARGE and len(shape) > 3:
        heads = [
            scaled_dot_product_attention(
                query[:, i], key[:, i], value[:, i], None if mask is None else mask[:, i]
            )
            for i in range(shape[1])
        ]
        return np.stack(heads, axis=1)
    scores = np.matmul(query * np.float32(query.shape[-1] ** -0.5), key.swapaxes(-1, -2))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, value)


def reduce(of: Callable[..., Array]) -> Callable[..., Array]:
    """Return the operator that reduces axes by a numpy function."""

    def apply(x: Array, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Array:
        return of(x, axis=None if axes is None else tuple(axes), keepdims=keep_dims)

    return apply


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    """Return ``1 / sqrt(x + epsilon)``."""
    return 1 / np.sqrt(x + np.float32(epsilon))


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """Reshape ``x``; a size 0 keeps the axis at that position from the right, as since iOS 17."""
    sizes = [int(size) for size in shape]
    return x.reshape([x.shape[index - len(sizes)] if size == 0 else size for index, size in enumerate(sizes)])


def transpose(x: Array, perm: Sequence[int]) -> Array:
    """Permute the axes."""
    return x.transpose(perm)


def expand_dims(x: Array, axes: Sequence[int]) -> Array:
    """Insert axes of size 1."""
    return np.expand_dims(x, tuple(axes))


def split(
    x: Array, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None
) -> list[Array]:
    """Split an axis into equal parts or into parts of the given sizes."""
    if split_sizes is None:
        assert num_splits
        return np.split(x, num_splits, axis)
    return np.split(x, np.cumsum(split_sizes)[:-1], axis)


def concat(values: list[Array], axis: int, interleave: bool = False) -> Array:
    """Join arrays along an axis."""
    if interleave:
        raise NotImplementedError("concat with interleave")
    return np.concatenate(values, axis)


def slice_by_index(x: Array, **bounds: Any) -> Array:
    """Return a slice; the masks ignore a bound or remove an axis."""
    return x[_slices(x.ndim, **bounds)]


def slice_update(x: Array, update: Array, **bounds: Any) -> Array:
    """Return a copy of ``x`` with a slice replaced by ``update``."""
    out = x.copy()
    where = _slices(x.ndim, **bounds)
    if out[where].shape != update.shape:
        raise ValueError(f"slice_update of {list(out[where].shape)} by {list(update.shape)}")
    out[where] = update
    return out


def _slices(
    rank: int,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> tuple[int | slice, ...]:
    slices: list[int | slice] = []
    for axis in range(rank):
        if squeeze_mask is not None and squeeze_mask[axis]:
            slices.append(int(begin[axis]))
            continue
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        slices.append(slice(first, last, None if stride is None else int(stride[axis])))
    return tuple(slices)


def pad(x: Array, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0) -> Array:
    """Pad with a constant; ``pad`` has the sizes before and after the last axes."""
    if mode != "constant":
        raise NotImplementedError(f"pad in the mode {mode}")
    sides = np.asarray(pad).reshape(-1, 2)
    before = [(0, 0)] * (x.ndim - len(sides))
    return np.pad(x, before + [tuple(side) for side in sides], constant_values=constant_val)


def gather(
    x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Array:
    """Return the entries of an axis at ``indices``."""
    if batch_dims:
        raise NotImplementedError("gather with batch_dims")
    return np.take(x, indices, axis=axis)


def cast(x: Array, dtype: str) -> Array:
    """Convert to a dtype; half precision is stored as float32."""
    return x.astype({"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}[dtype])


def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array | int = 0, axis: int | None = None
) -> Array:
    """Return integer codes, rounded half to even and clipped to ``output_dtype``."""
    limits = np.iinfo(output_dtype)
    codes = np.rint(input / _along(scale, input, axis)) + _along(zero_point, input, axis)
    return np.clip(codes, limits.min, limits.max).astype(output_dtype)


def dequantize(input: Array, scale: Array, zero_point: Array | int = 0, axis: int | None = None) -> Array:
    """Return the real values of integer codes."""
    return (input.astype(np.float32) - _along(zero_point, input, axis)) * _along(scale, input, axis)


def _along(values: Any, x: Array, axis: int | None) -> Array:
    """Return values shaped to broadcast along an axis of ``x``."""
    values = np.asarray(values, np.float32)
    return (
        values if axis is None else values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    )


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Return a weight from its codes, with one scale (and one offset) per block."""
    codes = data.astype(np.float32)
    if offset is not None:
        codes = codes - _blocks(offset.astype(np.float32), data.shape)
    return codes * _blocks(scale.astype(np.float32), data.shape)


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: int | None = None) -> Array:
    """Return a weight from indices into palettes ``[..., entries, 1]``, one palette per block."""
    if lut.shape[-1] != 1:
        raise NotImplementedError("palettes of vectors")
    palettes = [
        np.repeat(np.arange(groups), size // groups)
        for groups, size in zip(lut.shape[:-2], indices.shape, strict=True)
    ]
    return lut[..., 0].astype(np.float32)[(*np.ix_(*palettes), indices)]


def _blocks(values: Array, shape: Sequence[int]) -> Array:
    """Repeat each value over the block that it belongs to."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


OPERATORS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "cast": cast,
    "concat": concat,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "conv": conv,
    "dequantize": dequantize,
    "expand_dims": expand_dims,
    "gather": gather,
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "identity": lambda x: x,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "mul": lambda x, y: x * y,
    "pad": pad,
    "quantize": quantize,
    "real_div": lambda x, y: x / y,
    "reduce_max": reduce(np.max),
    "reduce_mean": reduce(np.mean),
    "reshape": reshape,
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "silu": silu,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "split": split,
    "sub": lambda x, y: x - y,
    "transpose": transpose,
}
# Operators whose outputs are values of their inputs; they are not rounded.
EXACT = frozenset(
    {"abs", "concat", "expand_dims", "gather", "identity", "maximum", "pad", "reduce_max", "reshape",
     "slice_by_index", "slice_update", "split", "transpose"}
)  # fmt: skip
