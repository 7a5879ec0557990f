"""What apps call beside what our pipeline runs, and values of the manifest: each fault is named by parity."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsvl_export.parity_check.entry_points import judge_entry_points
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.quantization_error import QuantizationError
from dsvl_export.parity_check.result import ParityResult, StageResult
from dsvl_export.parity_check.settings import settings_faults
from dsvl_export.parity_check.text import bundled_texts
from dsvl_export.parity_check.tolerances import component_tolerances, load_tolerances
from reference.tiny import HELDOUT
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import write_json
from runtimes.bundle.manifest import MANIFEST, TOKENIZER
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.goldens.texts import rerecord_texts, text_differences
from runtimes.pipeline import Pipeline
from runtimes.session import Execution
from runtimes.text.tokenizer import Tokenizer
from tests.dsvl_export.parity_check.faults import rehash

LABELS = {
    "name",
    "meaning",
    "tools",
    "target",
    "layout",
    "parity",
    "taps",
}  # which are shown, and decide nothing


def judged(bundle: Bundle, backend: str, precision: str) -> StageResult:
    """The stage of the entry points alone, on the first golden."""
    pipeline = Pipeline.open(bundle, backend, precision)
    result = ParityResult(backend, precision, Execution("ran"), "")
    result.tolerances = component_tolerances(load_tolerances(), bundle, backend, precision)
    checkpoint = bundle.manifest.checkpoint["sha256"]
    judge_entry_points(
        bundle, pipeline.chain, Goldens.of_bundle(bundle), checkpoint, result, QuantizationError()
    )
    return result.stage("entry_points")


@pytest.fixture
def program(executorch_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of ExecuTorch's bundle to spoil."""
    pytest.importorskip("executorch", reason="executorch is not installed here")
    return Path(shutil.copytree(executorch_bundle.folder, tmp_path / "bundle"))


def test_sound_entry_points_pass(program: Path) -> None:
    stage = judged(Bundle.open(program), "executorch", "fp32")
    assert (stage.state, stage.detail) == ("passed", "")
    names = ("vision_encoder, with the adaptor", "of the stored prefix")
    assert stage.errors and any(name in stage.errors.tensor for name in names)  # the largest error's


def test_the_runners_token_embeddings_are_judged(program: Path) -> None:
    """Our session reads the bundle's table; the table in the program is upside down."""
    path = "executorch/fp32/program/model.pte"
    table = load_file(program / "token_embedding/token_embedding.safetensors")["token_embedding"]
    content = (program / path).read_bytes()
    assert content.count(table.tobytes()) == 1
    (program / path).write_bytes(content.replace(table.tobytes(), table[::-1].tobytes()))
    stage = judged(rehash(program, path), "executorch", "fp32")
    assert stage.state == "failed"
    assert (
        stage.detail == "method token_embedding gives another embedding for token 0 than the bundle's table"
    )


def test_the_runners_tokenizer_is_judged(program: Path) -> None:
    path = "executorch/fp32/program/tokenizer.json"
    raw = json.loads((program / path).read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["Q"], vocabulary["X"] = vocabulary["X"], vocabulary["Q"]
    write_json(program / path, raw)
    stage = judged(rehash(program, path), "executorch", "fp32")
    assert stage.state == "failed"
    assert stage.detail.startswith("the runner's tokenizer.json tokenizes 'Q'")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> Bundle:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    write_json(folder / MANIFEST, raw)
    return Bundle.open(folder)


def test_what_the_program_says_is_judged(program: Path) -> None:
    def other_capacity(raw: dict[str, Any]) -> None:
        for artifact in raw["artifacts"]:
            artifact["capacity"] = 512

    stage = judged(change_manifest(program, other_capacity), "executorch", "fp32")
    assert stage.state == "failed"
    assert stage.detail == "method get_max_seq_len says 300, the bundle says 512"


def test_a_row_of_the_token_table_that_no_golden_reads_is_judged(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    path = tiny_bundle.manifest.token_embedding
    (table,) = load_file(folder / path).values()
    table[-1] = 0
    save_file({"token_embedding": table}, folder / path)
    stage = judged(rehash(folder, path), "onnxruntime", "fp32")
    assert stage.state == "failed"
    assert stage.detail.startswith(f"the manifest has files.{path}.sha256 ")


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all scalars but labels."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in LABELS:
                yield from leaves(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*place, index))
    else:
        yield place


def perturbed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5
    return 1 if value is None else f"{value}x"


def test_no_value_of_the_manifest_changes_an_answer_unseen(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Each value is changed: opening or parity refuses it, or the answer is as before."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    original = json.loads((folder / MANIFEST).read_text())
    for part in ("contracts", "artifacts"):  # fp32 alone
        kept = original[part]
        if isinstance(kept, dict):
            original[part] = {"fp32": kept["fp32"]}
        else:
            original[part] = [item for item in kept if item["precision"] == "fp32"]
    item = load_task(HELDOUT)[0]

    def answer() -> str:
        return Pipeline.open(folder, verify=False).chat(item.messages, item.images).text

    write_json(folder / MANIFEST, original)
    expected = answer()
    refused = 0
    for place in [place for place in leaves(original) if place[0] != "files"]:
        raw = copy.deepcopy(original)
        inner = raw
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = perturbed(inner[place[-1]])
        write_json(folder / MANIFEST, raw)
        try:
            bundle = Bundle.open(folder)
            checkpoint = bundle.manifest.checkpoint["sha256"]
            Goldens.of_bundle(bundle).load(0, checkpoint)
            tokenizer = Tokenizer(bundle.path(TOKENIZER), bundle.manifest.prompt)
            texts = bundled_texts(bundle)
            assert texts
            differences = place[0] == "prompt" and list(
                text_differences(rerecord_texts(texts, tokenizer), texts)
            )
            if not differences and not list(settings_faults(bundle, None)):
                assert answer() == expected, place
                continue
        except UserError:
            pass
        refused += 1
    assert refused > 60


def test_a_default_capacity_that_holds_no_golden_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from dsvl_export.parity_check import parity

    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    bundle = change_manifest(folder, lambda raw: raw.update(default_capacity=1))
    with pytest.raises(UserError, match="KV cache of 1 tokens"):
        parity(bundle, "onnxruntime", "fp32")


def test_the_graph_without_prompts_is_an_entry_point(tiny_bundle: Bundle) -> None:
    """Only a decoder with a second graph has one; see ``PREFILL_FROM``."""
    chain = Pipeline.open(tiny_bundle, "onnxruntime", "fp32").chain
    found = load_backend("onnxruntime").entry_points(chain, {"decoder"}, 1024)  # type: ignore[attr-defined]
    assert not found.decoders
    decoder: Any = chain.decoder
    decoder._prefill = object()
    found = load_backend("onnxruntime").entry_points(chain, {"decoder"}, 1024)  # type: ignore[attr-defined]
    (name, other), *_ = found.decoders.items()
    assert name == "decoder without its graph for prompts" and other._prefill is decoder._session
    cache = other.new_cache(1, 64)
    width = other.contract.inputs[0].shape[-1]
    assert np.isfinite(other.decode(np.zeros((1, 40, width), np.float32), np.array([39]), cache)).all()
