"""What an audit found: a verdict for each part of a bundle, and where a part differs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dsvl_export.parity_check.result import EXIT_CODES
from runtimes.units import size

State = Literal["passed", "failed", "not audited"]
MOST_SHOWN = 20  # differences of a part; the rest is counted


@dataclass(frozen=True)
class Difference:
    """A tensor, node or value that is not what the checkpoint and the plan make of it.

    ``where`` is the place of the first differing value, and ``count`` how many of ``total`` values differ;
    all three are empty where the difference is none of values.
    """

    name: str
    detail: str
    where: tuple[int, ...] = ()
    count: int = 0
    total: int = 0

    def __str__(self) -> str:
        amount = f", {self.count} of {self.total} values differ" if self.count else ""
        return f"{self.name}: {self.detail}{amount}"


@dataclass
class AuditedPart:
    """One artifact, or one of the files that all artifacts share.

    Args:
        name: as in ``onnxruntime fp32 decoder``, or ``token_embedding``.
        method: how it was compared.
        tensors, values, nodes, bytes: how many were compared; nodes are operators of a graph, bytes those of
            files that were compared as they are.
        reason: why it, or a part of it, was not audited.
    """

    name: str
    files: tuple[str, ...] = ()
    method: str = ""
    tensors: int = 0
    values: int = 0
    nodes: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)
    more: int = 0  # differences beyond those kept
    reason: str = ""

    @property
    def state(self) -> State:
        if self.differences:
            return "failed"
        return "not audited" if self.reason else "passed"

    @property
    def compared(self) -> str:
        """How much was compared, in words."""
        counts = (("tensors", self.tensors), ("values", self.values), ("nodes", self.nodes))
        parts = [f"{count} {name}" for name, count in counts if count]
        return ", ".join([*parts, *([size(self.bytes)] if self.bytes else [])])

    def add(self, difference: Difference) -> None:
        if len(self.differences) < MOST_SHOWN:
            self.differences.append(difference)
        else:
            self.more += 1

    def to_dict(self) -> dict[str, Any]:
        return {"state": self.state, **asdict(self)}


@dataclass
class Audit:
    """The audit of a bundle."""

    checkpoint: str
    parts: list[AuditedPart] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """As of ``ParityResult``: nothing passes that was not compared."""
        states = {part.state for part in self.parts}
        if "failed" in states:
            return "failed"
        return "passed" if states == {"passed"} else "not judged"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "checkpoint": self.checkpoint,
            "parts": [part.to_dict() for part in self.parts],
        }
