"""Recorded reference inputs and outputs."""
