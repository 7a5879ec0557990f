"""Recorders of goldens, the reference model's outputs that parity compares with."""
