"""What the commands ``calibrate``, ``sensitivity`` and ``plan-precision`` run.

This folder loads the data, resumes interrupted work, distributes samples over a cluster, and writes
result files and plots. The methods (observers, scales, GPTQ, the search) are in the package
``calibration``, which exports use too.
"""
