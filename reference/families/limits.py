"""Limits of the numbers in a config: above them, a short file would cost gigabytes or minutes."""

MAX_DECODER_LAYERS = 128  # tracing takes about 0.1 s per layer
MAX_VISION_LAYERS = 64  # of one tower, or of an adaptor
MAX_IMAGE_SIZE = 4096  # pixels
MAX_VOCAB_SIZE = 1 << 24
MAX_POSITIONS = 1 << 20
MIN_STD, MAX_STD = 1e-6, 1000.0
