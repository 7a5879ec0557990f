"""The PyTorch reference model, its checkpoints and its traced components."""
