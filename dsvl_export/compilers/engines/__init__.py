"""TensorRT and TensorRT-RTX engines from ONNX files; needs neither torch nor a checkpoint."""
