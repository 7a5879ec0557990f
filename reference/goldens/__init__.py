"""Recording goldens with the reference model."""
