"""Core ML programs (MIL): lowered from the traced components and written as packages."""

import logging

# coremltools warns at import that Core ML itself is not on this system, and of every newer PyTorch.
logging.getLogger("coremltools").setLevel(logging.ERROR)
