"""Checkpoint readers: configs, tensors, tokenizers and image processors in both layouts."""
