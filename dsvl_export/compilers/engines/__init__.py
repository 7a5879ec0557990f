"""Engines of TensorRT and TensorRT-RTX from ONNX files; needs neither torch nor a checkpoint."""
