"""Dialect ``openvino``: what OpenVINO's reader of ONNX files turns into its own operators."""

from __future__ import annotations

from dsvl_export.compilers.onnx.dialect_trt10 import Trt10Dialect


class OpenVinoDialect(Trt10Dialect):
    """The graph reads the cache and returns the new rows, as ``trt10``."""
