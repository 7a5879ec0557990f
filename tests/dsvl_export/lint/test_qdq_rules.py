"""TensorRT's rules of quantization: a failing example for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 -- registers int4 with numpy
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsvl_export.lint.quantization import quantization_problems
from runtimes.errors import UserError

IN, OUT = 32, 8


def model(folder: Path, **changes: Any) -> Path:
    """A quantized linear layer, with some of its parts replaced."""
    parts: dict[str, np.ndarray] = {
        "x_scale": np.float32(0.1).reshape(()), "zero": np.int8(0).reshape(()),
        "codes": np.ones((IN, OUT), np.int8), "w_scale": np.full(OUT, 0.1, np.float32),
    }  # fmt: skip
    axis = changes.pop("axis", 1)
    block, removed = changes.pop("block", 0), changes.pop("remove", ())
    parts |= changes
    weight = {"block_size": block, "axis": 0} if block else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"][: 2 if "zero" in removed else 3], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "zero"][: 2 if "zero" in removed else 3], ["dx"], "dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "w_scale"], ["dw"], "weight", **weight),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], "product"),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, IN])]
    inputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in removed if name != "zero"
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, OUT])],
        [numpy_helper.from_array(array, name) for name, array in parts.items() if name not in removed],
    )  # fmt: skip
    file = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), str(file))
    return file


def test_a_good_file_has_no_problems(tmp_path: Path) -> None:
    assert quantization_problems(model(tmp_path)) == []
    four = np.ones((IN, OUT), np.dtype("int4"))
    assert (
        quantization_problems(
            model(tmp_path, codes=four, w_scale=np.full((2, OUT), 0.1, np.float32), block=16)
        )
        == []
    )


def test_constants_can_be_nodes(tmp_path: Path) -> None:
    """As PyTorch's exporter by tracing writes them."""
    file = model(tmp_path)
    loaded = onnx.load(str(file))
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in loaded.graph.initializer
    ]
    del loaded.graph.initializer[:]
    for node in reversed(nodes):
        loaded.graph.node.insert(0, node)
    onnx.save(loaded, str(file))
    assert quantization_problems(file) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"zero": np.int8(3).reshape(())}, "quantize: its zero point is not 0"),
        ({"zero": np.uint8(0).reshape(())}, "quantize: its codes are uint8; TensorRT supports int8, float8e4m3fn, int4"),
        ({"remove": ("zero",)}, "quantize: without a zero point its codes are uint8"),
        ({"x_scale": np.float32(0).reshape(())}, "quantize: its scale x_scale must be positive and finite"),
        ({"w_scale": np.full(OUT, -1, np.float32)}, "weight: its scale w_scale must be positive"),
        ({"w_scale": np.full(OUT, np.nan, np.float32)}, "weight: its scale w_scale must be positive and finite"),
        ({"remove": ("x_scale",)}, "quantize: its scale x_scale is not a constant"),
        ({"x_scale": np.full(IN, 0.1, np.float32), "zero": np.zeros(IN, np.int8)}, "quantize: an activation has 32 scales"),
        ({"axis": 0, "w_scale": np.full(IN, 0.1, np.float32)}, "weight: its scales are along axis 0, MatMul needs axis 1"),
        ({"w_scale": np.full((2, OUT), 0.1, np.float32), "block": 16}, "weight: blocks of 16 need 4-bit codes"),
    ],
)  # fmt: skip
def test_every_rule_has_a_file_that_breaks_it(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert any(sentence in found for found in quantization_problems(model(tmp_path, **changes))), (
        quantization_problems(model(tmp_path, **changes))
    )


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff\xff no")
    with pytest.raises(UserError, match="is not a readable ONNX file"):
        quantization_problems(tmp_path / "x.onnx")
