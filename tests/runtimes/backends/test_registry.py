"""Backends by name, those of third parties among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.backends.registry import GROUP, backend_names, load_backend
from runtimes.errors import UserError


def test_backends_register_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path: its entry point is a backend like ours."""
    ours = ["coreai", "coreml", "executorch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]
    assert backend_names() == ours
    (tmp_path / "quantum_backend.py").write_text("SUFFIX = '.qubits'\n")
    information = tmp_path / "quantum-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: quantum\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[{GROUP}]\nquantum = quantum_backend\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert backend_names() == sorted([*ours, "quantum"])
    assert load_backend("quantum").SUFFIX == ".qubits"  # type: ignore[attr-defined]
    (tmp_path / "quantum_backend.py").unlink()
    monkeypatch.delitem(__import__("sys").modules, "quantum_backend")
    with pytest.raises(UserError, match="backend 'quantum' of quantum cannot be loaded: No module named"):
        load_backend("quantum")
