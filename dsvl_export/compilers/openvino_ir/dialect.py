"""The ONNX dialect that OpenVINO reads."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from dsvl_export.compilers.lowering import fake_tensor
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.dialect_standard import Heads
from dsvl_export.compilers.onnx.dialect_trt10 import Trt10Dialect


class OpenVinoDialect(Trt10Dialect):
    """The dialect for TensorRT 10, which is made of primitive operators that OpenVINO fuses.

    The decoder's graph reads the cache and returns the new rows.
    """

    def angles(self, context: Lowering, table: Node, heads: Heads, positions: str) -> str:
        """Gather rows of a RoPE table; positions beyond it, which padding has, get the last row."""
        graph, last = context.graph, int(fake_tensor(table).shape[0]) - 1
        limit = graph.constant(np.array(last, np.int64), "last_position")
        if "limited_positions" not in context.scratch:
            limited = graph.node("Min", [positions, limit], "limited_positions")
            context.scratch["limited_positions"] = limited
        return super().angles(context, table, heads, context.scratch["limited_positions"])
