"""Fixtures that need no torch; ``conftest.py`` and ``tests/pythons/without_torch.py`` take them from here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsvl_export import cli
from reference.tiny import TINY
from reference.tiny.pictures import draw_scene
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import Done


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines that tests build are not remembered in the developer's home."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def bundle_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to spoil."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in [*TINY.glob("*.json"), TINY / "model.safetensors"]:
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four rendered pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{seed}.png" for seed in range(4)]
    for seed, file in enumerate(files):
        draw_scene((seed, 1234))[0].save(file)
    return files


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dsvl-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return call
