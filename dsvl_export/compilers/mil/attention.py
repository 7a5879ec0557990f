"""RMSNorm and attention in MIL, the two operators that need care in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from torch.fx import Node

from dsvl_export.compilers.lowering import arguments, fake_tensor, numpy_dtype, to_numpy
from dsvl_export.compilers.mil.context import MilLowering, Var

# Far below any score, and a score of up to 35,000 can be added to it in half precision.
MASKED = -30000.0


def rms_norm(context: MilLowering, node: Node) -> Var:
    """Lower ``x / sqrt(mean(x²) + ε) · w`` (arXiv 1910.07467, eq. 4) within half precision's range.

    The square of a number above 256 exceeds 65,504, so rows are divided by their largest magnitude
    ``m`` first: with ``y = x / m``, the norm is ``y / sqrt(mean(y²) + ε / m²) · w``. ``m`` is at
    least ``sqrt(ε)``, so that ``ε / m²`` is at most 1, and finite where ``x`` is small.
    """
    x, _, weight, epsilon = arguments(node)
    source, root = context.value(x), context.number(epsilon**0.5, node)
    largest = context.op("reduce_max", x=context.op("abs", x=source), axes=[-1], keep_dims=True)
    largest = context.op("maximum", x=largest, y=root)
    scaled = context.op("real_div", x=source, y=largest)
    mean = context.op("reduce_mean", x=context.op("mul", x=scaled, y=scaled), axes=[-1], keep_dims=True)
    share = context.op("real_div", x=root, y=largest)
    shifted = context.op("add", x=mean, y=context.op("mul", x=share, y=share))
    normed = context.op(
        "mul", x=scaled, y=context.op("rsqrt", x=shifted, epsilon=context.number(1e-12, node))
    )
    return context.emit(node, mb.mul, x=normed, y=context.value(weight))


def attention(context: MilLowering, node: Node) -> Var:
    """Lower the softmax attention of the vision towers, with or without an additive bias."""
    if len(node.args) > 4 or node.kwargs.keys() - {"attn_mask"}:
        raise NotImplementedError("causal, scaled or dropped-out attention in a vision tower")
    query, key, value, bias = arguments(node, None, None, node.kwargs.get("attn_mask"))
    mask = {} if bias is None else {"attn_mask": context.value(bias)}
    operands = {
        name: context.value(part) for name, part in (("query", query), ("key", key), ("value", value))
    }
    return context.emit(node, mb.scaled_dot_product_attention, **operands, **mask)


def cached_attention(context: MilLowering, node: Node) -> Var:
    """Rotate, write the new keys and values into the states, attend over the whole capacity.

    Positions are consecutive in a row, so the new rows are one slice of the state.
    """
    query, key, value, positions, cos, sin, keys, values, *_ = arguments(node)
    places = context.value(positions)
    _, kv_heads, capacity, head_dim = context.full_shape(keys)
    length = context.full_shape(query)[1]
    heads = context.full_shape(query)[2] // head_dim
    angles = [_angles(context, table, places, capacity) for table in (cos, sin)]
    q, k, v = (
        context.op(
            "transpose",
            x=context.op("reshape", x=context.value(part), shape=[1, length, count, head_dim]),
            perm=[0, 2, 1, 3],
        )
        for part, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )  # [1, H, S, Dh]
    q, k = _rotate(context, q, angles), _rotate(context, k, angles)
    begin, end = _span(context, places)
    stored = []
    for state, rows in ((keys, k), (values, v)):
        variable = context.value(state)
        updated = context.op(
            "slice_update",
            x=context.op("read_state", input=variable),
            update=rows,
            begin=begin,
            end=end,
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
        )
        stored.append(context.op("coreml_update_state", state=variable, value=updated))
    mask = _visible(context, places, length, capacity, node)
    groups = heads // kv_heads
    if groups > 1:  # the query heads of a group attend like further tokens
        q = context.op("reshape", x=q, shape=[1, kv_heads, -1 if length < 0 else groups * length, head_dim])
        mask = context.op("concat", values=[mask] * groups, axis=2)
    out = context.op("scaled_dot_product_attention", query=q, key=stored[0], value=stored[1], attn_mask=mask)
    if groups > 1:
        out = context.op("reshape", x=out, shape=[1, heads, length, head_dim])
    out = context.op("transpose", x=out, perm=[0, 2, 1, 3])
    return context.emit(node, mb.reshape, x=out, shape=[1, length, heads * head_dim])


def _angles(context: MilLowering, table: Node, positions: Var, capacity: int) -> Var:
    """Gather rows ``[1, 1, S, Dh / 2]`` of a RoPE table ``[C, Dh / 2]``, once for all layers."""
    constant, dtype = context.constant(table), numpy_dtype(fake_tensor(table).dtype)
    key = f"rows of {constant.name}"
    if key not in context.scratch:
        table_constant = context.add_constant(
            f"{constant.name}_table",
            dtype,
            (capacity, int(fake_tensor(table).shape[1])),
            lambda: to_numpy(constant.load())[:capacity],
        )
        rows = context.op("gather", x=table_constant, indices=positions, axis=0)
        context.scratch[key] = context.op("expand_dims", x=rows, axes=[1])
    return context.scratch[key]


def _rotate(context: MilLowering, x: Var, angles: list[Var]) -> Var:
    """Apply RoPE in LLaMA's half-split form to ``[1, H, S, Dh]``."""
    first, second = context.op("split", x=x, num_splits=2, axis=-1)
    cos, sin = angles
    turned = [
        context.op("sub", x=context.op("mul", x=first, y=cos), y=context.op("mul", x=second, y=sin)),
        context.op("add", x=context.op("mul", x=second, y=cos), y=context.op("mul", x=first, y=sin)),
    ]
    return context.op("concat", values=turned, axis=-1)


def _span(context: MilLowering, positions: Var) -> tuple[Var, Var]:
    """Return where the new rows begin and end in a state, once for all layers."""
    if "span" not in context.scratch:
        everything: Any = np.array([0], np.int32)
        first = context.op(
            "slice_by_index", x=positions, begin=[0, 0], end=[1, 1], squeeze_mask=[True, False]
        )
        last = context.op("slice_by_index", x=positions, begin=[0, -1], end=[1, 0],
                                 end_mask=[False, True], squeeze_mask=[True, False])  # fmt: skip
        after = context.op("add", x=last, y=np.array([1], np.int32))
        context.scratch["span"] = tuple(
            context.op("concat", values=[everything, everything, place, everything], axis=0)
            for place in (first, after)
        )
    return context.scratch["span"]


def _visible(context: MilLowering, positions: Var, length: int, capacity: int, node: Node) -> Var:
    """Build the additive mask ``[1, 1, S, C]``: a token attends to the slots up to its own."""
    if "visible" not in context.scratch:
        slots = context.add_constant(
            "slots", np.dtype(np.int32), (1, 1, 1, capacity),
            lambda: np.arange(capacity, dtype=np.int32).reshape(1, 1, 1, -1),
        )  # fmt: skip
        down = context.op("reshape", x=positions, shape=[1, 1, length, 1])
        hidden = context.op("cast", x=context.op("greater", x=slots, y=down), dtype="fp16")
        context.scratch["visible"] = context.op("mul", x=hidden, y=context.number(MASKED, node))
    return context.scratch["visible"]
