"""Artifacts of converters that write them alike every time: made again, and compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsvl_export.audit.result import AuditedPart, Difference
from dsvl_export.audit.values import compare_files
from dsvl_export.compilers.protocol import Compiled
from runtimes.backends.coreai import PROGRAM
from runtimes.backends.mil.package import SPECIFICATION, package_folder

METHOD = "compared byte for byte with the artifact made again"


def compare_remade(
    compile_into: Callable[[Path], Compiled],
    folder: Path,
    stage: Path,
    tools: dict[str, str],
    part: AuditedPart,
    strict: bool,
) -> None:
    """Make an artifact again in ``folder`` and note in ``part`` where that of the bundle differs.

    Args:
        stage: folder of the bundle's artifact.
        tools: what wrote it; another version may write other bytes that mean the same.
        strict: whether a difference fails; a converter of which it is not known that it writes the same file
            every time leaves the artifact unaudited.
    """
    part.method = METHOD
    compiled = compile_into(folder)
    found: list[Difference] = []
    for file in compiled.files:
        path = file.relative_to(folder)
        content = stage / path
        part.bytes += file.stat().st_size
        if not content.is_file():
            found.append(Difference(str(path), "is missing"))
        elif difference := compare_files(str(path), content, file):
            found.append(difference)
    if not found:
        return
    differences = _explained(found, compiled.files, stage, folder)
    if not differences:
        part.method = f"{METHOD}, but for names that are random"
        return
    other = [
        f"{name} {tools[name]}" for name, here in compiled.tools.items() if tools.get(name, here) != here
    ]
    if other or not strict:
        why = f"it was written by {', '.join(other)}, of which this is another version" if other else ""
        part.reason = f"made again it differs, and {why or 'what that means is not known'}"
        return
    for difference in differences:
        part.add(difference)


def _explained(
    found: Sequence[Difference], files: Sequence[Path], stage: Path, folder: Path
) -> Sequence[Difference]:
    """What differs, by name, in a format that can be read; nothing where the files mean the same."""
    if files[0].name == Path(SPECIFICATION).name:
        from dsvl_export.audit.mil_package import package_differences

        package = package_folder(files[0])
        return package_differences(stage / package.relative_to(folder), package) or found
    if files[0].name == PROGRAM and all((stage / file.relative_to(folder)).is_file() for file in files):
        from dsvl_export.audit.coreai_asset import asset_differences

        asset = files[0].parent
        names = [Path(difference.name).name for difference in found]
        return asset_differences(stage / asset.relative_to(folder), asset, names)
    return found
