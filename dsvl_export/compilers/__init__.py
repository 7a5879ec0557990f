"""Compilers: from a traced component to the artifacts of a backend."""
