"""The ladder of proof: a backend's artifacts against the reference, rung by rung.

preprocess → vision encoder → adaptor → prefill logits → teacher-forced logits → greedy tokens → task
accuracy; ``docs/how-to/add-a-backend.md`` says what a backend owes it.
"""

from dsvl_export.parity_check.against_bundle import compare
from dsvl_export.parity_check.against_reference import parity
from dsvl_export.parity_check.result import EXIT_CODES, ParityResult, Rung

__all__ = ["EXIT_CODES", "ParityResult", "Rung", "compare", "parity"]
