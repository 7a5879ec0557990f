"""TensorRT engines on an NVIDIA GPU, shared by ``tensorrt`` and ``tensorrt_rtx``."""
