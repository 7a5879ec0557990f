"""Calibration of a checkpoint, measured sensitivity, and the search for a precision plan."""
