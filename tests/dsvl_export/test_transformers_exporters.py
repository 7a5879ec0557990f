"""Our backends as export formats of transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.exporters import AutoHfExporter
from transformers.exporters.auto import EXPORT_BACKENDS
from transformers.exporters.base import ExportedModel
from transformers.exporters.utils import decompose_for_generation

from dsvl_export.compilers.registry import compiler_names
from dsvl_export.transformers_exporters import BundleConfig, register
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from tests.conftest import OraclePair
from tests.oracles.test_transformers import oracle_inputs, prompt_ids


@pytest.fixture(autouse=True)
def formats() -> Iterator[list[str]]:
    """The registered formats, which other tests do not see."""
    before = dict(EXPORT_BACKENDS)
    yield register()
    EXPORT_BACKENDS.clear()
    EXPORT_BACKENDS.update(before)


def inputs_of(pair: OraclePair, images: int = 2) -> dict[str, Any]:
    """The arguments of transformers' forward pass."""
    side = pair.model.config.vision.image_size
    pixels = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(5))
    ids = prompt_ids(pair, images)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **oracle_inputs(pair, pixels)}


def test_a_bundle_is_called_like_the_model(pair: OraclePair, tmp_path: Path, formats: list[str]) -> None:
    """With images, from memory and after saving, and without; and it answers."""
    assert formats == [f"dsvl-{name}" for name in compiler_names()]
    inputs = inputs_of(pair)
    config = {"export_format": "dsvl-onnxruntime", "processor": str(pair.checkpoint.folder), "capacity": 256}
    exported = AutoHfExporter.from_config(config).export_for_generation(pair.oracle, inputs, config)
    expected = pair.oracle(**inputs).logits
    found = exported(**inputs)
    assert type(found) is type(pair.oracle(**inputs))
    assert (found.logits - expected).abs().max() < 1e-4 * expected.abs().max()
    text = {"input_ids": inputs["input_ids"][:, :7].repeat(2, 1)}
    assert torch.allclose(
        exported(**text).logits, pair.oracle(**text).logits, atol=1e-4 * float(expected.abs().max())
    )
    exported.save_pretrained(tmp_path / "saved")
    again = ExportedModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs).logits, found.logits)
    assert Pipeline.open(exported.program).generate("Hello").tokens


def test_what_a_bundle_does_not_take(siglip_pair: OraclePair, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(siglip_pair)
    config = BundleConfig("dsvl-onnxruntime", str(siglip_pair.checkpoint.folder), capacity=256)
    exported = AutoHfExporter.from_config(config).export(siglip_pair.oracle, inputs, config)
    with pytest.raises(UserError, match="takes no padding"):
        exported(**{**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])})
    with pytest.raises(UserError, match="takes no inputs_embeds as input"):
        exported.runners["model"](**inputs, inputs_embeds=torch.zeros(1))
    monkeypatch.setattr(siglip_pair.oracle, "name_or_path", "")
    with pytest.raises(UserError, match="has no folder with its tokenizer; give one as processor"):
        config = BundleConfig("dsvl-onnxruntime")
        AutoHfExporter.from_config(config).export(siglip_pair.oracle, inputs, config)


def test_components_of_transformers(pair: OraclePair) -> None:
    """What the page that compares exporters says: neither vision encoder nor adaptor."""
    assert list(decompose_for_generation(pair.oracle, inputs_of(pair, 1))) == [
        "language_model",
        "lm_head",
        "decode",
    ]


def test_nothing_imports_it_by_default() -> None:
    code = "import sys, dsvl_export, dsvl_export.exporter.export; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
