"""Reading checkpoints: configs, tensors, tokenizers and processors in both layouts."""
