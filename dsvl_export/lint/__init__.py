"""Check ONNX files against TensorRT's rules; a finding has node, rule and remedy."""

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.lint import Release, lint, refuse

__all__ = ["Finding", "Release", "lint", "refuse"]
