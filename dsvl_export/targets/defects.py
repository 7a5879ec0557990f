"""Known defects of the runtimes and libraries of the targets, from ``defects.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from packaging.specifiers import SpecifierSet

from dsvl_export.targets.machine import package_versions
from runtimes.bundle.yaml_files import read_yaml

TABLE = Path(__file__).parent / "defects.yaml"


@dataclass(frozen=True)
class Defect:
    """One defect; ``defects.yaml`` defines the fields."""

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
        """Return whether all its packages are installed in versions that have the defect."""
        return all(affected is True for affected in self._packages(versions))

    def avoided(self, versions: Mapping[str, str]) -> bool:
        """Return whether one of its packages is installed in a version without the defect."""
        return any(affected is False for affected in self._packages(versions))

    def _packages(self, versions: Mapping[str, str]) -> Iterator[bool | None]:
        """Yield for each package whether the installed version is affected.

        None if not installed.
        """
        for name, wanted in self.packages.items():
            version = versions.get(name) or versions.get(f"{name}-gpu")  # a build of it
            yield SpecifierSet(wanted).contains(version, prereleases=True) if version else None

    def __str__(self) -> str:
        """Return the defect, what to do, the targets and the link, in one line."""
        where = f" [{', '.join(self.targets)}]" if self.targets else ""
        return f"{self.what} {self.do}{where}{f' ({self.link})' if self.link else ''}"


@cache
def load_defects() -> tuple[Defect, ...]:
    """Load all known defects."""
    return tuple(Defect(**row) for row in read_yaml(TABLE, "table of defects"))


def warnings_for(
    backend: str, precision: str, target: str | None = None, context: int | None = None
) -> list[Defect]:
    """Return the defects that affect a request and that dsvl-export does not handle.

    Args:
        backend: of the request.
        precision: of the request.
        target: name of the target; None includes the defects of all targets.
        context: tokens in the KV cache; None includes the defects of any context.
    """
    versions = package_versions()
    return [
        defect
        for defect in load_defects()
        if not (defect.handled or defect.broken)
        and not defect.avoided(versions)
        and backend in (defect.backends or [backend])
        and precision in (defect.precisions or [precision])
        and (target is None or target in (defect.targets or [target]))
        and (context is None or defect.context_above is None or context > defect.context_above)
    ]
