"""TensorRT engines on an NVIDIA GPU: what ``tensorrt`` and ``tensorrt_rtx`` share."""
