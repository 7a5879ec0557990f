"""Core AI's assets, converted by Apple's coreai-torch from the traced components."""
