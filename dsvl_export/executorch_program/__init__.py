"""Traced components as one ExecuTorch program of several methods."""
