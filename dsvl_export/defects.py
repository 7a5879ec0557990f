"""Known defects of the targets' runtimes, as data: ``defects.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

TABLE = Path(__file__).parent / "defects.yaml"


@dataclass(frozen=True)
class Defect:
    """One defect; ``defects.yaml`` says what the fields mean."""

    id: str
    what: str
    do: str
    link: str | None
    packages: Mapping[str, str] = field(default_factory=dict)
    backends: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    context_above: int | None = None
    broken: bool = False
    handled: str = ""
    seen: str = ""

    def installed(self, versions: Mapping[str, str]) -> bool:
        """Whether the packages it needs are there in the versions that have it."""
        return all(
            name in versions and SpecifierSet(wanted).contains(versions[name], prereleases=True)
            for name, wanted in self.packages.items()
        )

    def __str__(self) -> str:
        return f"{self.what} {self.do}{f' ({self.link})' if self.link else ''}"


@cache
def load_defects() -> tuple[Defect, ...]:
    return tuple(Defect(**row) for row in yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def warnings_for(
    backend: str, precision: str, target: str | None = None, context: int | None = None
) -> list[Defect]:
    """Defects that a request would meet and that are not handled.

    Args:
        target: None where it is not decided yet; defects of single targets are left out then.
        context: tokens in the KV cache.
    """
    return [
        defect
        for defect in load_defects()
        if not (defect.handled or defect.broken)
        and backend in (defect.backends or [backend])
        and precision in (defect.precisions or [precision])
        and (not defect.targets or target in defect.targets)
        and (defect.context_above is None or (context or 0) > defect.context_above)
    ]
