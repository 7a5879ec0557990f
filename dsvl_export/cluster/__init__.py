"""Function calls on the machines of a Ray cluster."""
