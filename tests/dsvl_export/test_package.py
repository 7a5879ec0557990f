"""The installed package: ``python -m dsvl_export``, and the files that a wheel must hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from dsvl_export.version import PACKAGES, __version__

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULE = (sys.executable, "-m", "dsvl_export")


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--version",), 0), (("inspect", "no-bundle"), 2), (("no-command",), 2)]
)
def test_python_m_is_the_command(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    as_module = run(*MODULE, *arguments, folder=tmp_path)
    as_command = run(str(Path(sys.executable).with_name("dsvl-export")), *arguments, folder=tmp_path)
    assert as_module.returncode == code
    assert (as_module.returncode, as_module.stdout, as_module.stderr) == (
        as_command.returncode,
        as_command.stdout,
        as_command.stderr,
    )
    if code == 0:
        assert as_module.stdout == f"dsvl-export {__version__}\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"][package]
