"""Lower traced programs to ONNX graphs, and write them without holding the weights in memory."""
