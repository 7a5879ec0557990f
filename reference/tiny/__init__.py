"""The bundled checkpoint ``tiny``, and the programs that made its weights and questions."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parent
HELDOUT = TINY / "heldout" / "questions.jsonl"
# ``Checkpoint.digest`` of the bundled files; the held-out questions belong to its bundles only.
TINY_DIGEST = "82a51146e622257ff9063312ba80f28ca895f63f2176b73ef3f19ec8c04d08f4"
