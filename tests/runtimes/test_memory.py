"""How much memory there is: the machine's, and what the control groups of a container or a service leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from runtimes import memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 60 of them free, without limits."""
    (tmp_path / "membership").write_text("")
    free = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    return tmp_path


def write(folder: Path, names: tuple[str, str, tuple[str, ...]], most: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, usage, cached = names
    (folder / limit).write_text(most + "\n")
    (folder / usage).write_text(f"{used}\n")
    rows = [f"anon {used - files}", *(f"{name} {files // 2}" for name in cached)]
    (folder / "memory.stat").write_text("\n".join(rows) + "\n")


def test_a_machine_without_limits(system: Path) -> None:
    assert memory.available_memory() == 60 * GIB
    (system / "membership").unlink()
    assert memory.available_memory() == 60 * GIB


@pytest.mark.parametrize("path", ["/", "/../of/the/host", "/a.slice/b.service"])
def test_the_tightest_group_around_the_process_counts(system: Path, path: str) -> None:
    """Version 2; what the group holds as a cache of files can be taken back."""
    (system / "membership").write_text(f"0::{path}\n")
    write(system / "groups", memory.FILES[2], str(8 * GIB), 5 * GIB, 1 * GIB)
    assert memory.available_memory() == 4 * GIB
    write(system / "groups/a.slice", memory.FILES[2], "max", 5 * GIB, 0)
    write(system / "groups/a.slice/b.service", memory.FILES[2], str(2 * GIB), 3 * GIB, 0)
    assert memory.available_memory() == (0 if path.startswith("/a.slice") else 4 * GIB)


def test_groups_of_version_1(system: Path) -> None:
    (system / "membership").write_text("7:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    write(system / "groups/memory", memory.FILES[1], str(1 << 63), 50 * GIB, 0)
    assert memory.available_memory() == 60 * GIB
    write(system / "groups/memory/docker/abc", memory.FILES[1], str(6 * GIB), 3 * GIB, 2 * GIB)
    assert memory.available_memory() == 5 * GIB
