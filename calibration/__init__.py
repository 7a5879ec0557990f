"""Calibration data, observers, the scale table, quantized programs. Empty until quantization lands."""
