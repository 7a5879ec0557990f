"""Predictions for an export, and the diagnosis of this machine."""
