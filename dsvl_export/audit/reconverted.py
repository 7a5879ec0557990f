"""The audit of artifacts of deterministic converters: convert again, and compare byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsvl_export.audit.result import AuditedPart, Difference
from dsvl_export.audit.values import compare_files
from dsvl_export.compilers.protocol import Compiled
from runtimes.backends.coreai import PROGRAM
from runtimes.backends.mil.package import SPECIFICATION, package_folder

METHOD = "converted again and compared byte for byte"


def compare_reconverted(
    compile_into: Callable[[Path], Compiled],
    folder: Path,
    stage: Path,
    tools: dict[str, str],
    part: AuditedPart,
    strict: bool,
) -> None:
    """Convert an artifact again and record in ``part`` where the artifact of the bundle differs.

    Args:
        compile_into: converts the artifact into a folder.
        folder: an empty folder for the new artifact.
        stage: folder of the bundle's artifact.
        tools: versions of the tools that wrote the bundle's artifact; other versions may write
            other bytes with the same meaning.
        part: the part of the audit that receives the result.
        strict: a difference fails. Without it, a difference leaves the artifact unaudited, for
            converters that may not be deterministic.
    """
    part.method = METHOD
    compiled = compile_into(folder)
    changed: list[Difference] = []
    for file in compiled.files:
        path = file.relative_to(folder)
        content = stage / path
        part.bytes += file.stat().st_size
        if not content.is_file():
            changed.append(Difference(str(path), "is missing"))
        elif difference := compare_files(str(path), content, file):
            changed.append(difference)
    if not changed:
        return
    differences = _explain_differences(changed, compiled.files, stage, folder)
    if not differences:
        part.method = f"{METHOD}, except for random names"
        return
    other_versions = [
        f"{name} {tools[name]}" for name, here in compiled.tools.items() if tools.get(name, here) != here
    ]
    if other_versions:
        part.reason = f"a new conversion differs; the artifact was written by {', '.join(other_versions)}"
        return
    if not strict:
        part.reason = "a new conversion differs, and the converter may not be deterministic"
        return
    for difference in differences:
        part.add(difference)


def _explain_differences(
    changed: Sequence[Difference], files: Sequence[Path], stage: Path, folder: Path
) -> Sequence[Difference]:
    """Name what differs, for formats that can be read.

    Return nothing if the files mean the same.
    """
    if files[0].name == Path(SPECIFICATION).name:
        from dsvl_export.audit.mil_package import package_differences

        package = package_folder(files[0])
        return package_differences(stage / package.relative_to(folder), package) or changed
    if files[0].name == PROGRAM and all((stage / file.relative_to(folder)).is_file() for file in files):
        from dsvl_export.audit.coreai_asset import asset_differences

        asset = files[0].parent
        names = [Path(difference.name).name for difference in changed]
        return asset_differences(stage / asset.relative_to(folder), asset, names)
    return changed
