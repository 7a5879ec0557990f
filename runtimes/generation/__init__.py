"""Sampling, decoding and speculation."""
