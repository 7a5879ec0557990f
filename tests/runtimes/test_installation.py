"""What messages and docs say to install: it exists, and it is the smallest thing that helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from dsvl_export.compilers.registry import BUILT_IN, EXTRAS
from runtimes import installation
from runtimes.installation import ON_JETSON, PACKAGES, install_command

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
TORCH_FREE = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "serve", "ray", "report")
NAMED = re.compile(r"(?:dsvl-export|\'\.)\[([\w,.-]+)\]")


def packages_of(extra: str) -> set[str]:
    """Distributions that an extra installs, those of the extras in it among them."""
    found = set()
    for text in OPTIONAL[extra]:
        requirement = Requirement(text)
        nested = requirement.extras if requirement.name == "dsvl-export" else ()
        found |= set().union(*map(packages_of, nested)) if nested else {requirement.name}
    return found


def sources() -> list[Path]:
    folders = ("runtimes", "reference", "calibration", "dsvl_export", "integrations", "benchmarks")
    code = [file for name in folders for file in (ROOT / name).rglob("*.py")]
    data = [file for name in folders for file in (ROOT / name).rglob("*.yaml")]
    return [*code, *data, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]


def test_every_extra_that_is_named_exists() -> None:
    named = {
        extra
        for file in sources()
        for match in NAMED.findall(file.read_text(encoding="utf-8"))
        for extra in match.split(",")
    }
    named |= {extra for extras in EXTRAS.values() for extra in extras.split(",")}
    assert {"cpu", "onnxruntime", "serve", "export"} <= named
    assert named <= set(OPTIONAL)
    assert set(EXTRAS) == set(BUILT_IN)


def test_what_runs_without_torch_is_installed_without_it() -> None:
    for extra in TORCH_FREE:
        assert "torch" not in packages_of(extra), extra
    for module in ("onnx", "onnxruntime", "coremltools", "cuda", "tensorrt", "uvicorn", "ray", "jinja2"):
        extras = re.findall(r"\[([\w-]+)\]", install_command(module))
        assert "torch" not in install_command(module)
        assert not any("torch" in packages_of(extra) for extra in extras), module


def test_packages_are_ones_that_the_project_declares() -> None:
    """Within its bounds, so that a message does not install what is refused later."""
    declared: dict[str, str] = {}
    for requirements in OPTIONAL.values():
        declared |= {Requirement(text).name: str(Requirement(text).specifier) for text in requirements}
    for module, arguments in PACKAGES.items():
        for argument in arguments.replace("'", "").split():
            requirement = Requirement(argument)
            if requirement.name == "dsvl-export":
                continue
            assert requirement.name in declared, module
            if requirement.specifier:
                assert str(requirement.specifier) == declared[requirement.name], module


def test_every_package_belongs_to_an_extra_of_users() -> None:
    """A failed import of any other package is an internal error."""
    distributions = {"coreai": "coreai-core", "cuda": "cuda-python", "ray": "ray"}
    for module in PACKAGES:
        name = distributions.get(module, module.replace("_", "-"))
        assert any(name in packages_of(extra) for extra in OPTIONAL if extra != "dev"), module


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert install_command("onnx.helper") == "pip install onnx"
    assert install_command("onnxruntime") == "pip install 'dsvl-export[onnxruntime]'"
    assert install_command("cuda.bindings") == "pip install cuda-python"
    assert install_command("something_else") == "pip install something_else"
    jetson = tmp_path / "nv_tegra_release"
    jetson.touch()
    monkeypatch.setattr(installation, "JETSON", jetson)
    assert "cuda-python==12.6.*" in install_command("cuda.bindings")
    assert "--system-site-packages" in install_command("tensorrt")  # JetPack's own; pip has none for it
    assert install_command("onnx") == "pip install onnx"
    assert set(ON_JETSON) <= set(PACKAGES)
