"""Known defects of the targets' runtimes, as data: ``defects.yaml``."""

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
        return all(has is True for has in self._packages(versions))

    def avoided(self, versions: Mapping[str, str]) -> bool:
        """Whether one of its packages is there in a version that does not have it."""
        return any(has is False for has in self._packages(versions))

    def _packages(self, versions: Mapping[str, str]) -> Iterator[bool | None]:
        """For each package whether the installed version has the defect; None where it is not installed."""
        for name, wanted in self.packages.items():
            version = versions.get(name) or versions.get(f"{name}-gpu")  # a build of the same release
            yield SpecifierSet(wanted).contains(version, prereleases=True) if version else None

    def __str__(self) -> str:
        where = f" [{', '.join(self.targets)}]" if self.targets else ""
        return f"{self.what} {self.do}{where}{f' ({self.link})' if self.link else ''}"


@cache
def load_defects() -> tuple[Defect, ...]:
    return tuple(Defect(**row) for row in read_yaml(TABLE, "table of defects"))


def warnings_for(
    backend: str, precision: str, target: str | None = None, context: int | None = None
) -> list[Defect]:
    """Defects that a request would meet and that are not handled.

    Args:
        target: None where it is not decided yet; defects of any target count then.
        context: tokens in the KV cache; None where it is not decided yet.
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
