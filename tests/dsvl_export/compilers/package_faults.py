"""Faults planted into saved Core ML packages, as a converter's mistakes would look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends.mil.package import SPECIFICATION, WEIGHTS, Package
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.parity_check.faults import rehash

Edit = Callable[["Opened"], None]


class Opened:
    """A package being edited: the operations of its functions (all, or one), and its weights."""

    def __init__(self, folder: Path, function: str | None = None) -> None:
        self.package, self.function = Package(folder), function
        self.weights = bytearray((folder / WEIGHTS).read_bytes())

    def blocks(self) -> Iterator[Any]:
        for name in [self.function] if self.function else self.package.function_names:
            proto = self.package.function(name)
            yield proto.block_specializations[proto.opset]

    def operations(self, output: str) -> list[Any]:
        """The operation that gives a value, in every function that has it."""
        found = [
            op for block in self.blocks() for op in block.operations if output in [o.name for o in op.outputs]
        ]
        assert found, f"nothing gives {output}"
        return found

    def save(self) -> None:
        (self.package.folder / SPECIFICATION).write_bytes(self.package.model.SerializeToString())
        (self.package.folder / WEIGHTS).write_bytes(self.weights)


def plant(bundle: Path, precision: str, component: str, edit: Edit, function: str | None = None) -> Bundle:
    """Edit a package of a bundle and give it its new hashes, so that only parity can notice.

    Args:
        function: the only one to edit; None edits all.
    """
    stage = f"coreml/{precision}/{component}/{component}.mlpackage"
    opened = Opened(bundle / stage, function)
    edit(opened)
    opened.save()
    rehash(bundle, f"{stage}/{WEIGHTS}")
    return rehash(bundle, f"{stage}/{SPECIFICATION}")


def weight(name: str, dtype: str, change: Callable[[np.ndarray], Any], argument: str = "") -> Edit:
    """Change the stored values of a constant, or of an argument of what decompresses it, in place."""

    def edit(opened: Opened) -> None:
        operation = opened.operations(name)[0]
        value = operation.inputs[argument].arguments[0].value if argument else operation.attributes["val"]
        offset = int(value.blobFileValue.offset)
        size, begin = np.frombuffer(opened.weights, "<u8", 2, offset + 8)
        values = np.frombuffer(opened.weights, dtype, int(size) // np.dtype(dtype).itemsize, int(begin))
        sizes = [int(dim.constant.size) for dim in value.type.tensorType.dimensions]
        view = (
            values.reshape(sizes) if values.size == np.prod(sizes) else values
        )  # codes of four bits are packed
        before = view.copy()
        change(view)
        assert not np.array_equal(before, view)

    return edit


def immediate(name: str, argument: str, value: Any, kind: str) -> Edit:
    """Give an argument of an operation another constant."""

    def edit(opened: Opened) -> None:
        for operation in opened.operations(name):
            constant = operation.inputs[argument].arguments[0].name
            for given in opened.operations(constant):
                tensor = given.attributes["val"].immediateValue.tensor
                if kind == "half":
                    tensor.bytes.values = np.float16(value).tobytes()
                else:
                    field = getattr(tensor, kind)
                    del field.values[:]
                    field.values.extend(value)

    return edit


def rewire(name: str, argument: str, source: str, index: int = 0) -> Edit:
    """Let an operation read another value."""

    def edit(opened: Opened) -> None:
        for operation in opened.operations(name):
            assert operation.inputs[argument].arguments[index].name != source
            operation.inputs[argument].arguments[index].name = source

    return edit


def operator(name: str, kind: str) -> Edit:
    """Make an operation another one with the same arguments."""

    def edit(opened: Opened) -> None:
        for operation in opened.operations(name):
            assert operation.type != kind
            operation.type = kind

    return edit


def swap(name: str, argument: str) -> Edit:
    """Exchange the first two values of a list."""

    def edit(opened: Opened) -> None:
        for operation in opened.operations(name):
            first, second = operation.inputs[argument].arguments[:2]
            first.name, second.name = second.name, first.name

    return edit


def without(kind: str, state: str) -> Edit:
    """Drop the operation of a kind on a state."""

    def edit(opened: Opened) -> None:
        for block in opened.blocks():
            (found,) = [
                index for index, op in enumerate(block.operations)
                if op.type == kind and op.inputs["input"].arguments[0].name == state
            ]  # fmt: skip
            del block.operations[found]

    return edit


def unbound(name: str, argument: str) -> Edit:
    """Drop an argument."""

    def edit(opened: Opened) -> None:
        for operation in opened.operations(name):
            del operation.inputs[argument]

    return edit


def zero(view: np.ndarray) -> None:
    view[...] = 0


def reverse(view: np.ndarray) -> None:
    view[...] = view[::-1].copy()


def scaled(factor: float) -> Callable[[np.ndarray], None]:
    def change(view: np.ndarray) -> None:
        view *= np.float16(factor)

    return change


def zero_row(view: np.ndarray) -> None:
    view[1] = 0


def rolled(view: np.ndarray) -> None:
    view[...] = np.roll(view, 1, axis=-1)


def rows_rolled(view: np.ndarray) -> None:
    view[...] = np.roll(view, 1, axis=0)


def halves_swapped(view: np.ndarray) -> None:
    """The two codes of each byte."""
    view[...] = (view >> 4) | (view << 4)


@dataclass(frozen=True)
class PackageFault:
    """A fault, and whether the goldens show it: the audit shows what lies within the precision's own error."""

    name: str
    precision: str
    component: str
    edit: Edit
    hidden: bool = False


D, V, A = "decoder", "vision_encoder", "adaptor"
LAYER = "layers__0__self_attn_cached_attention"
FAULTS = [
    PackageFault("a zeroed weight row", "fp16", D, weight("layers__3__mlp__down_proj__weight", "<f2", zero_row)),
    PackageFault("a scaled norm weight", "fp16", D, weight("norm__weight", "<f2", scaled(1.1))),
    PackageFault("cosines for sines", "fp16", D, rewire(f"{LAYER}_gather_2", "x", "cos_table")),
    PackageFault("a sum in RoPE's difference", "fp16", D, operator(f"{LAYER}_sub", "add")),
    PackageFault("halves swapped after RoPE", "fp16", D, swap(f"{LAYER}_concat_2", "values")),
    PackageFault("no causal mask", "fp16", D, immediate(f"{LAYER}_mul_9", "y", 0.0, "half")),
    PackageFault("rows written one slot late", "fp16", D, immediate(f"{LAYER}_slice_by_index", "begin", [0, 1], "ints")),
    PackageFault("keys that are never stored", "fp16", D, without("write_state", "key_cache_2")),
    PackageFault("values of another layer", "fp16", D, rewire("layers__1__self_attn_cached_attention_coreml_update_state_2", "input", "value_cache_0")),
    PackageFault("a gate without SiLU", "fp16", D, operator("layers__0__mlp_silu", "identity")),
    PackageFault("a residual of the wrong place", "fp16", D, rewire("layers__2_add", "x", "layers__0_add")),
    PackageFault("shifted logits", "fp16", D, weight("head__weight", "<f2", reverse)),
    PackageFault("the first row's logits", "fp16", D, operator("norm_rms_norm_rsqrt", "identity")),
    PackageFault("no position embedding", "fp16", V, weight("low__pos_embed", "<f2", zero)),
    PackageFault("BGR for RGB", "fp16", V, weight("low__patch_embed__proj__weight", "<f2", lambda view: reverse(view.swapaxes(0, 1)))),
    PackageFault("no relative positions", "fp16", V, unbound("high__blocks__1__attn_scaled_dot_product_attention", "attn_mask")),
    PackageFault("keys for values", "fp16", V, rewire("low__blocks__1__attn_scaled_dot_product_attention", "value", "low__blocks__1__attn_transpose_2")),
    PackageFault("a LayerNorm with a large epsilon", "fp16", V, immediate("low__blocks__0__norm1_layer_norm", "epsilon", 0.5, "half")),
    PackageFault("low features first", "fp16", A, swap("cat", "values")),
    PackageFault("no GELU", "fp16", A, operator("layers__0_gelu", "silu")),
    PackageFault("nibbles swapped", "int4-fp16", D, weight("layers__0__mlp__up_proj_quantize_per_channel_group_folded_dense", "u1", halves_swapped, "data")),
    PackageFault("scales of the next group", "int4-fp16", D, weight("layers__0__mlp__up_proj_quantize_per_channel_group_folded_dense", "<f2", rolled, "scale"), hidden=True),
    PackageFault("scales of the next row", "int4-fp16", D, weight("layers__0__mlp__up_proj_quantize_per_channel_group_folded_dense", "<f2", rows_rolled, "scale")),
    PackageFault("a palette upside down", "palette4-fp16", D, weight("layers__0__mlp__up_proj_quantize_palette_folded_dense", "<f2", lambda view: view.__setitem__(..., view[:, :, ::-1].copy()), "lut")),
    PackageFault("an activation's scale doubled", "int8-fp16", V, immediate("low__blocks__0__mlp__fc2_quantize_per_tensor", "scale", 0.5, "half")),
]  # fmt: skip


def pixels_scaled(opened: Opened) -> None:
    """Multiply an image's pixels by one and a half times of what they should be."""
    (operation,) = opened.operations("mul_0")
    (constant,) = opened.operations(operation.inputs["y"].arguments[0].name)
    values = constant.attributes["val"].immediateValue.tensor.bytes
    values.values = (np.frombuffer(values.values, np.float16) * np.float16(1.5)).tobytes()


# Faults of single functions: those that apps call, and that the default device does not.
FUNCTION_FAULTS = [
    ("image", "vision_encoder", pixels_scaled, None),
    ("prefill", "decoder", rewire("layers__0__self_attn_cached_attention_gather_2", "x", "cos_table"), None),
    ("extend", "decoder", rewire("layers__0__self_attn_cached_attention_gather_2", "x", "cos_table"), "ane"),
]
