"""Core AI assets, converted from the traced components by Apple's coreai-torch."""
