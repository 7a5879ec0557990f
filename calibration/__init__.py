"""Calibration and quantization: data, observers, scales, precision plans, quantized programs."""
