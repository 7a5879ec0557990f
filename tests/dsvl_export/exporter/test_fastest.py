"""``--backend auto``: the fastest backend and precision for each component."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsvl_export import ExportConfig
from dsvl_export.exporter import fastest
from dsvl_export.exporter.config import ComponentChoices
from dsvl_export.exporter.fastest import Candidate, export_fastest
from dsvl_export.parity_check import parity
from dsvl_export.targets.targets import find_target
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.bundle.mixes import COMPONENTS
from runtimes.errors import UserError

pytest.importorskip("openvino", reason="openvino is not installed here")


def timed(seconds: dict[str, tuple[float, float, float]]) -> Any:
    """A stand-in for ``bench``, for times that do not depend on the machine."""

    def bench(folder: Path, backend: str, precision: str, options: Any) -> Any:
        vision, adaptor, prefill = seconds[f"{backend}:{precision}"]
        lowest = {"vision_encoder": vision, "adaptor": adaptor, "prefill": prefill}
        stages = {name: SimpleNamespace(low=value) for name, value in lowest.items()}
        return SimpleNamespace(stages=stages, decoding=[SimpleNamespace(step=SimpleNamespace(low=0.0))])

    return bench


def test_auto_takes_the_fastest_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run) -> None:
    times = {"onnxruntime:fp32": (2.0, 1.0, 1.0), "openvino:fp32": (1.0, 1.1, 2.0)}
    monkeypatch.setattr(fastest, "bench", timed(times))
    folder = tmp_path / "bundle"
    done = run("export", "tiny", "--backend", "auto", "--precision", "fp32", "-o", folder)
    assert done.code == 0, done.err
    assert "measured on this machine" in done.err and "Parity of mixed" in done.out
    bundle = Bundle.open(folder)
    name = "openvino-fp32+onnxruntime-fp32+onnxruntime-fp32"
    assert bundle.choices() == [("mixed", name)]
    assert len(bundle.manifest.artifacts) == 3 and not bundle.problems()
    assert list(bundle.manifest.parity) == [f"mixed/{name}"]
    assert {file.name for file in (folder / "reports").iterdir()} == {
        f"parity-mixed-{name}.json", f"parity-mixed-{name}.html",
    }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_auto_with_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"onnxruntime:fp32": (2.0, 2.0, 2.0), "openvino:fp32": (1.0, 1.0, 1.0)}
    monkeypatch.setattr(fastest, "bench", timed(times))
    made = export_fastest(ExportConfig("tiny", "auto", ("fp32",)), tmp_path / "b", lambda progress: None)
    assert made.bundle.choices() == [("openvino", "fp32")] and not made.bundle.problems()
    assert not list((tmp_path / "b").glob("onnxruntime*"))


def test_an_interrupted_auto_goes_on_and_extends_a_bundle(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was judged is not judged again, and the bundle of the user is left alone until the end."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    before = (folder / MANIFEST).read_text()
    components = ComponentChoices(vision_encoder="openvino:fp32")
    config = ExportConfig("tiny", "auto", ("fp32",), components)

    def interrupted(folder: Path, backend: str, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastest, "bench", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_fastest(config, folder, lambda progress: None)
    assert (folder / MANIFEST).read_text() == before
    judged: list[tuple[str, str]] = []
    monkeypatch.setattr(fastest, "parity", lambda bundle, *pair: judged.append(pair) or parity(bundle, *pair))
    times = {"onnxruntime:fp32": (1.0, 1.0, 1.0), "openvino:fp32": (2.0, 2.0, 2.0)}
    monkeypatch.setattr(fastest, "bench", timed(times))
    made = export_fastest(config, folder, lambda progress: None)
    assert judged == [("openvino", "fp32")]  # ONNX Runtime was judged before the interruption
    assert made.bundle.choices() == [
        ("onnxruntime", "fp32"), ("onnxruntime", "fp16"),
        ("mixed", "openvino-fp32+onnxruntime-fp32+onnxruntime-fp32"),
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precisions": ("zzz",)}, "^There is no precision 'zzz'"),
        ({"goldens": False}, "auto chooses among what passes the parity check, which needs goldens"),
        ({"components": ComponentChoices(decoder="openvno:fp32")}, "There is no backend 'openvno'"),
        ({"components": ComponentChoices(decoder="openvino:fp16")}, "It does not fit the decoder, which reads"),
        ({"precisions": ("fp8",), "switchable_adapters": ("a=b",)}, "openvino cannot switch adapters"),
    ],
)  # fmt: skip
def test_auto_refuses_before_any_work(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    config = replace(ExportConfig("tiny", "auto"), **settings)
    if "switchable_adapters" in settings:
        found = fastest._list_candidates(config, find_target("cpu"), open_checkpoint("tiny").config)
        assert any(message in item.problem.replace("The backend ", "") for item in found)
        return
    with pytest.raises(UserError, match=message):
        export_fastest(config, tmp_path / "b", lambda progress: None)
    assert not list(tmp_path.iterdir())


def test_auto_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("hi")
    with pytest.raises(UserError, match="b is a file; give a folder for the bundle"):
        export_fastest(ExportConfig("tiny", "auto"), tmp_path / "b", lambda progress: None)
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def candidate(backend: str, precision: str, dtype: str, *seconds: float) -> Candidate:
    return Candidate(backend, precision, precision, dtype, dict(zip(COMPONENTS, seconds, strict=False)))


def test_all_chosen_components_have_one_dtype_between_them() -> None:
    config = ExportConfig("tiny", "auto")
    found = [
        candidate("onnxruntime", "fp32", "float32", 3, 1, 3),
        candidate("openvino", "bf16", "float32", 2, 2, 4),
        candidate("openvino", "fp16", "float16", 1, 1, 9),
        replace(candidate("openvino", "int4", "float32"), problem="it differs"),
    ]
    chosen = fastest._choose(config, found)
    assert chosen == {
        "vision_encoder": "openvino:bf16", "adaptor": "onnxruntime:fp32", "decoder": "onnxruntime:fp32",
    }  # fmt: skip
    named = replace(config, components=ComponentChoices(decoder="openvino:fp16"))
    assert set(fastest._choose(named, found[2:]).values()) == {"openvino:fp16"}
    with pytest.raises(UserError, match="^it differs$"):
        fastest._choose(config, found[3:])
    other = replace(found[3], backend="onnxruntime", problem="it is slow")
    with pytest.raises(UserError, match=r"from \(openvino int4: it differs; onnxruntime int4: it is slow\)"):
        fastest._choose(config, [found[3], other])


@pytest.mark.parametrize(
    ("target", "chosen"),
    [("h100", "tensorrt:bf16"), ("iphone", "coreml:fp16"), ("arc-b580", "openvino:fp16")],
)
def test_the_bounds_decide_for_another_device(tmp_path: Path, target: str, chosen: str) -> None:
    config = ExportConfig("tiny", "auto", target=target, goldens=False, capacity=256)
    made = export_fastest(config, tmp_path / "b", lambda progress: None)
    assert not made.measured and set(made.config.components.chosen().values()) == {chosen}
