"""What a rule found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule, or a file that no rule was tried on.

    Args:
        node: its name, or that of an input, output or initializer.
        rule: the rule's short name.
        effect: TensorRT has it ``refused``; or it takes it and ``changed`` is what it computes, without an
            error; or it is ``unusual``: against the documentation, though the parser takes it;
            ``not checked``: the file is for another runtime, and nothing is said of it.
        problem: what is wrong, as a sentence without its end.
        remedy: what to do instead, likewise.
    """

    node: str
    rule: str
    effect: Literal["refused", "changed", "unusual", "not checked"]
    problem: str
    remedy: str

    @property
    def harmful(self) -> bool:
        return self.effect in ("refused", "changed")

    @property
    def checked(self) -> bool:
        return self.effect != "not checked"

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}; {self.remedy}."
