"""A finding of the linter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule, or a file that was not checked.

    Args:
        node: name of the node, input, output or initializer.
        rule: short name of the rule.
        effect: ``refused``: TensorRT refuses the file. ``changed``: TensorRT computes something
            else, without an error. ``unusual``: against the documentation, but the parser accepts
            it. ``not checked``: the file is for another runtime.
        problem: what is wrong, as a sentence without its period.
        remedy: what to do, likewise.
    """

    node: str
    rule: str
    effect: Literal["refused", "changed", "unusual", "not checked"]
    problem: str
    remedy: str

    @property
    def harmful(self) -> bool:
        """Whether TensorRT refuses the file or changes what it computes."""
        return self.effect in ("refused", "changed")

    @property
    def checked(self) -> bool:
        """Whether a rule was checked."""
        return self.effect != "not checked"

    def __str__(self) -> str:
        """Name the node, the problem and the remedy in one sentence."""
        return f"{self.node}: {self.problem}; {self.remedy}."
