"""The parity check: the artifacts of a backend compared with the PyTorch reference in stages.

text → preprocess → vision encoder → adaptor → prefill logits → teacher-forced logits → greedy
tokens → task accuracy. ``docs/how-to/add-a-backend.md`` says what a backend must provide.
"""

from dsvl_export.parity_check.against_bundle import compare
from dsvl_export.parity_check.against_reference import parity
from dsvl_export.parity_check.result import EXIT_CODES, ParityResult, StageResult

__all__ = ["EXIT_CODES", "ParityResult", "StageResult", "compare", "parity"]
