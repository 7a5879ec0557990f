"""Backends: each runs the components of a bundle with one library."""
