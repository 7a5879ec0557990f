"""The result of an audit: a verdict for each part of a bundle, and where a part differs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dsvl_export.parity_check.result import EXIT_CODES
from runtimes.units import size

State = Literal["passed", "failed", "not audited"]
MAX_DIFFERENCES = 20  # kept for a part; further ones are only counted


@dataclass(frozen=True)
class Difference:
    """A tensor, node or setting that differs from what the checkpoint and the plan give.

    ``where`` is the index of the first value that differs, and ``count`` of ``total`` values
    differ. All three are empty if the difference is not one of values.
    """

    name: str
    detail: str
    where: tuple[int, ...] = ()
    count: int = 0
    total: int = 0

    def __str__(self) -> str:
        """Return one line: the name, the difference, and how many values differ."""
        amount = f", {self.count} of {self.total} values differ" if self.count else ""
        return f"{self.name}: {self.detail}{amount}"


@dataclass
class AuditedPart:
    """One artifact, or one of the files that all artifacts share.

    Attributes:
        name: such as ``onnxruntime/fp32/decoder`` or ``token_embedding``.
        files: paths in the bundle.
        method: how the part was compared.
        tensors: number of tensors that were compared.
        values: number of values that were compared.
        nodes: number of operators of a graph that were compared.
        bytes: size of the files that were compared byte for byte.
        differences: the first differences.
        more: number of further differences.
        reason: why the part, or some of it, was not audited.
    """

    name: str
    files: tuple[str, ...] = ()
    method: str = ""
    tensors: int = 0
    values: int = 0
    nodes: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)
    more: int = 0
    reason: str = ""

    @property
    def state(self) -> State:
        """``passed``, ``failed`` or ``not audited``."""
        if self.differences:
            return "failed"
        return "not audited" if self.reason else "passed"

    @property
    def compared(self) -> str:
        """What was compared, such as ``12 tensors, 3000 values``."""
        counts = (("tensors", self.tensors), ("values", self.values), ("nodes", self.nodes))
        parts = [f"{count} {name}" for name, count in counts if count]
        return ", ".join([*parts, *([size(self.bytes)] if self.bytes else [])])

    def add(self, difference: Difference) -> None:
        """Keep a difference, or count it if enough are kept."""
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)
        else:
            self.more += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the part as JSON values."""
        return {"state": self.state, **asdict(self)}


@dataclass
class Audit:
    """The result of the audit of a bundle; ``checkpoint`` is the folder it was compared with."""

    checkpoint: str
    parts: list[AuditedPart] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` or ``not judged``; nothing passes that was not compared."""
        states = {part.state for part in self.parts}
        if "failed" in states:
            return "failed"
        return "passed" if states == {"passed"} else "not judged"

    @property
    def exit_code(self) -> int:
        """Exit code of the command line for the verdict."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return {
            "verdict": self.verdict,
            "checkpoint": self.checkpoint,
            "parts": [part.to_dict() for part in self.parts],
        }
