"""``doctor``: what is there, what is missing with the command that installs it, and what does not go together."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from dsvl_export.cli.display_planning import print_diagnosis
from dsvl_export.compilers.precisions import check_request, plan_for
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.planning import doctor
from dsvl_export.targets.defects import Defect, load_defects
from dsvl_export.targets.machine import describe_machine, package_versions
from dsvl_export.targets.options import CompileOptions
from dsvl_export.targets.targets import load_targets
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.backends import coreai, coreml, executorch, onnxruntime, openvino
from runtimes.backends.onnxruntime_releases import FEATURES
from runtimes.errors import UserError


def test_this_machine_is_fit() -> None:
    found = doctor.diagnose()
    assert found["healthy"]
    compiles, runs = (found["backends"]["onnxruntime"][what] for what in ("compile", "run"))
    assert compiles["able"]
    assert set(compiles["precisions"]) == set(load_targets()["cpu"].backends["onnxruntime"])
    assert runs["devices"] == ["cpu"]
    assert set(runs["needs"]) == set(compiles["precisions"])
    assert (runs["needs"]["fp32"], runs["needs"]["kv-int8"], runs["needs"]["fp8"]) == ("1.23", "1.27", "1.32")
    assert found["packages"]["torch"].startswith("2.13")
    assert found["machine"] == {**describe_machine(), "available_bytes": found["machine"]["available_bytes"]}
    assert found["machine"]["memory_bytes"] > found["machine"]["available_bytes"] > 1e8
    assert "onnxruntime-silent-cpu" in {row["id"] for row in found["defects"]}


def test_precisions_that_the_installed_release_is_too_old_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "release", lambda: "1.23.2")
    monkeypatch.setattr(doctor, "package_versions", lambda: {**package_versions(), "onnxruntime": "1.23.2"})
    found = doctor.diagnose()
    assert found["backends"]["onnxruntime"]["run"]["too_old_for"] == ["kv-int8", "fp8"]
    ids = {row["id"] for row in found["defects"]}
    assert {"onnxruntime-float16-quantize", "onnxruntime-float8", "onnxruntime-int8-cache"} <= ids
    print_diagnosis(found)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "kv-int8 needs 1.27, fp8 needs 1.32; installed: 1.23.2" in shown
    assert "ONNX Runtime before 1.30 rounds float16 activations toward zero" in shown


def test_an_export_that_the_installed_release_cannot_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = load_compiler("onnxruntime")
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    config = open_checkpoint("tiny").config
    options = CompileOptions()
    check_request("onnxruntime", compiler, [plan_for(compiler, "int8")], config, options)
    with pytest.raises(
        UserError,
        match=r"kv-int8 cannot be exported here: it needs ONNX Runtime 1\.27 or later, but 1\.26\.0 is installed",
    ):
        check_request("onnxruntime", compiler, [plan_for(compiler, "kv-int8")], config, options)
    with pytest.raises(UserError, match=r"int8-fp16 .* 1\.30 or later"):
        check_request("onnxruntime", compiler, [plan_for(compiler, "int8-fp16")], config, options)


def test_defects_and_the_table_of_releases_agree() -> None:
    """One is read where files are opened, the other where warnings are made."""
    defects = {defect.id: defect for defect in load_defects()}
    for name, feature in FEATURES.items():
        defect = defects[f"onnxruntime-{name}"]
        assert defect.packages == {"onnxruntime": f"<{feature.since}"}
        assert defect.link == feature.link
        assert f"ONNX Runtime before {feature.since}" in defect.what


def test_a_build_for_gpus_counts_as_the_package() -> None:
    defect = Defect("x", "what", "do", None, packages={"onnxruntime": "<1.30"})
    assert defect.installed({"onnxruntime-gpu": "1.29.0"})
    assert defect.avoided({"onnxruntime-gpu": "1.30.0"})
    assert not defect.avoided({})


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_runtime() -> None:
        raise UserError(
            "The backend onnxruntime is not installed; run: pip install 'dsvl-export[onnxruntime]'."
        )

    def no_compiler(name: str) -> None:
        raise UserError(
            "Exporting to onnxruntime needs torch; run: pip install 'dsvl-export[export,onnxruntime]'."
        )

    monkeypatch.setattr(onnxruntime, "_import", no_runtime)
    for backend in (coreai, coreml, executorch, openvino):
        monkeypatch.setattr(backend, "devices", no_runtime)
    monkeypatch.setattr(doctor, "load_compiler", no_compiler)
    found = doctor.diagnose()
    assert not found["healthy"]
    assert "pip install 'dsvl-export[onnxruntime]'" in found["backends"]["onnxruntime"]["run"]["missing"]
    assert "dsvl-export[export,onnxruntime]" in found["backends"]["onnxruntime"]["compile"]["missing"]


def test_where_there_is_no_torch() -> None:
    """As on a Jetson: the commands answer, and say what is missing for compiling."""
    script = (
        "import sys\nfor name in ('torch', 'onnx', 'transformers'): sys.modules[name] = None\n"
        "sys.argv = ['dsvl-export', *sys.argv[1:]]\nfrom dsvl_export.cli import main\nmain()"
    )

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
        )

    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    backend = json.loads(done.stdout)["backends"]["onnxruntime"]
    assert backend["run"]["able"]
    assert "pip install 'dsvl-export[export,onnxruntime]'" in backend["compile"]["missing"]
    assert "This machine is ready." in run("doctor").stdout
    assert "jetson-orin-nano" in run("targets").stdout
    planned = run("plan", "tiny")
    assert planned.returncode == 2
    assert planned.stderr.startswith("Error: This command needs torch")


def test_a_broken_backend_of_others_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "dsvl_export.compilers": [EntryPoint("odd", "not_there_at_all", "dsvl_export.compilers")],
        "dsvl_export.runtimes": [EntryPoint("odd", "colorsys:nothing", "dsvl_export.runtimes")],
    }
    for module in ("dsvl_export.compilers.registry", "runtimes.backends.registry"):
        monkeypatch.setattr(f"{module}.entry_points", lambda group: entries[group])
    found = doctor.diagnose()
    assert found["healthy"]
    assert (
        "cannot be loaded: No module named 'not_there_at_all'"
        in found["backends"]["odd"]["compile"]["missing"]
    )
    assert (
        "The backend 'odd' of colorsys:nothing cannot be loaded" in found["backends"]["odd"]["run"]["missing"]
    )


def test_a_compiler_without_its_libraries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dsvl_export.compilers.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs onnx; run: pip install 'dsvl-export\[export,onnxruntime\]'"):
        load_compiler("onnxruntime")
    with pytest.raises(UserError, match=r"A debug build needs onnx; run: pip install onnx\."):
        load_compiler("onnxruntime", debug_build=True)


@pytest.mark.parametrize(
    ("versions", "broken"),
    [
        ({"executorch": "1.4.1", "torch": "2.12.0"}, {"executorch-torch"}),
        ({"executorch": "1.4.1", "torch": "2.13.0+cpu"}, set()),
        ({"optimum-onnx": "0.1.0", "transformers": "5.23.0"}, {"optimum-onnx-transformers"}),
        ({"optimum-onnx": "0.1.0", "transformers": "4.57.1"}, set()),
        ({"torch": "2.12.0"}, set()),
    ],
)
def test_version_pairs_that_break(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], broken: set[str]
) -> None:
    monkeypatch.setattr(doctor, "package_versions", lambda: versions)
    found = doctor.diagnose()
    assert {row["id"] for row in found["broken_pairs"]} == broken
    # Only the first breaks a backend of this release.
    assert found["healthy"] == (broken != {"executorch-torch"})


def test_defects_need_all_their_packages() -> None:
    defect = Defect("x", "what", "do", None, packages={"a": ">=1,<2", "b": ">=3"})
    assert defect.installed({"a": "1.5", "b": "3.0rc1+cpu"}) is False  # a pre-release of 3.0 is not yet 3.0
    assert defect.installed({"a": "1.5", "b": "3.0"})
    assert not defect.installed({"a": "2.0", "b": "3.0"})
    assert not defect.installed({"a": "1.5"})
    assert "dsvl-export" in package_versions()
