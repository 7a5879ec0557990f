"""The installed package: ``python -m dsvl_export``, and the files that a wheel must hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from setuptools import find_namespace_packages

from dsvl_export.version import PACKAGES, __version__
from tests.dsvl_export.cli.command_line import Done, refused

ROOT = Path(__file__).parents[3]
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


def shadow(folder: Path, name: str) -> Path:
    """A package of this name, as a user's own project may have one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    return folder / name


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "dsvl_export"])
def test_a_folder_that_hides_one_of_our_packages_is_named(name: str, tmp_path: Path) -> None:
    other = shadow(tmp_path, name)
    done = run(*MODULE, "--version", folder=tmp_path)
    assert refused(Done(done.returncode, done.stdout, done.stderr), f"imports {other} in place of")
    assert str(ROOT / name) in done.stderr


def test_a_program_gets_an_import_error(tmp_path: Path) -> None:
    """A program that imports dsvl_export can catch it, with the paths; modules hide packages as well."""
    (tmp_path / "reference.py").touch()
    program = "import sys\ntry:\n    import dsvl_export\nexcept ImportError as error:\n    print(error.path)"
    done = run(sys.executable, "-c", program, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'reference.py'}\n", "")


def test_a_package_without_a_place_is_left_to_its_import(tmp_path: Path) -> None:
    """A module that a program put in, and a finder that refuses a name, have no path to compare."""
    program = (
        "import sys, types\nsys.modules['reference'] = types.ModuleType('reference')\nimport dsvl_export"
    )
    done = run(sys.executable, "-c", program, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command_does_not_look_into_the_working_folder(tmp_path: Path) -> None:
    shadow(tmp_path, "runtimes")
    done = run(str(Path(sys.executable).with_name("dsvl-export")), "--version", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_link_to_our_packages_is_ours(tmp_path: Path) -> None:
    (tmp_path / "runtimes").symlink_to(ROOT / "runtimes")
    done = run(*MODULE, "--version", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_plugin_for_optimum_is_not_in_our_wheel() -> None:
    """transformers takes any folder ``optimum`` on the path for optimum itself."""
    include = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_namespace_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in packages} == set(PACKAGES)
    plugin = tomllib.loads((ROOT / "integrations/optimum/pyproject.toml").read_text())["project"]
    assert plugin["version"] == __version__
