"""Lowering of traced programs to ONNX graphs, and writing them without holding the weights."""
