"""Recording goldens: together or one by one, whole or streamed, they are the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from calibration.planned_model import planned_chain
from calibration.precision_plan import load_precision
from calibration.quantized_weights import QuantizedWeights
from reference.goldens.record import PHOTOGRAPHS, golden_requests, goldens_bytes
from reference.model.deepseek_vl import DeepSeekVL
from reference.session import reference_chain, write_token_embedding
from reference.trace import TRACED_COMPONENTS, component_contract
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens import recording
from runtimes.goldens.golden import GREEDY_TOKENS, load_golden, relative_rms
from runtimes.goldens.recording import record_goldens
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS, record_all_taps, record_taps, sample
from tests.conftest import OraclePair

DIGEST = "0" * 64


def chain_of(pair: OraclePair, folder: Path, tapped: bool = False, model: DeepSeekVL | None = None) -> Chain:
    table = folder / "table.safetensors"
    write_token_embedding(pair.checkpoint, table)
    return reference_chain(pair.checkpoint, table, model or pair.model, tapped)


def record(pair: OraclePair, folder: Path, positions: int, tapped: bool = False) -> list[tuple[int, int]]:
    folder.mkdir()
    chain, steps = chain_of(pair, folder), []
    requests = golden_requests(chain.tokenizer.spec.system_prompt)
    tap = partial(record_all_taps, chain_of(pair, folder, True)) if tapped else None
    record_goldens(
        chain, requests, folder / "goldens", DIGEST, positions, lambda *step: steps.append(step), tap
    )
    return steps


def test_groups_change_nothing(pair: OraclePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of all requests against one group per request; the progress reaches its total."""
    assert record(pair, tmp_path / "together", 300)[-1] == (10 + GREEDY_TOKENS, 10 + GREEDY_TOKENS)
    monkeypatch.setattr(recording, "CACHE_BYTES", 1)
    assert record(pair, tmp_path / "alone", 300)[-1] == (10 + 10 * GREEDY_TOKENS, 10 + 10 * GREEDY_TOKENS)
    for index in range(10):
        together, alone = (
            load_golden(tmp_path / way / f"goldens/{index:02}.safetensors") for way in ("together", "alone")
        )
        assert together.checkpoint == DIGEST
        assert together.greedy_tokens.tolist() == alone.greedy_tokens.tolist()
        assert np.allclose(together.logits, alone.logits, atol=1e-4)
        assert together.logits.argmax(-1).tolist() == together.greedy_tokens.tolist()
        assert np.array_equal(together.squares, alone.squares)
    images = {file.name for file in (tmp_path / "alone/goldens/images").iterdir()}
    assert len(images) == 12
    assert set(PHOTOGRAPHS) <= images  # scikit-image is installed where these tests run


def test_requests_that_do_not_fit_are_left_out(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    record(hybrid_pair, tmp_path / "some", 110)
    assert 0 < len(list((tmp_path / "some/goldens").glob("*.safetensors"))) < 10
    with pytest.raises(UserError, match="50 positions are too few for goldens; export with --no-goldens"):
        record(hybrid_pair, tmp_path / "none", 50)


def test_a_checkpoint_with_nan_is_not_recorded(siglip_pair: OraclePair, tmp_path: Path) -> None:
    model = siglip_pair.checkpoint.load_model()
    model.decoder.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="holds NaN or infinity in logits; check the checkpoint's weights"):
        record(replace(siglip_pair, model=model), tmp_path / "nan", 300)
    assert not list((tmp_path / "nan/goldens").glob("*.safetensors"))


def test_taps_are_those_of_the_contract(pair: OraclePair, tmp_path: Path) -> None:
    """Every block and layer has one, and the last tap of each component is what the component gives."""
    record(pair, tmp_path / "r", 300, tapped=True)
    golden = load_golden(tmp_path / "r/goldens/00.safetensors")
    assert TAPPED_COMPONENTS == TRACED_COMPONENTS
    for component in TAPPED_COMPONENTS:
        contract = component_contract(pair.checkpoint.config, component, "fp32")
        assert set(golden.taps[component]) == {spec.name for spec in contract.taps}
    config = pair.checkpoint.config
    assert {f"low.blocks.{i}" for i in range(config.vision.siglip.layers)} <= set(
        golden.taps["vision_encoder"]
    )
    assert {f"layers.{i}" for i in range(config.decoder.layers)} <= set(golden.taps["decoder"])
    assert np.array_equal(
        golden.taps["vision_encoder"]["low.norm"], sample(golden.features["low_features"][:1])
    )
    # Alone or together with a second image: another batch size, so not bit for bit.
    assert relative_rms(golden.taps["adaptor"]["layers.1" if config.vision.sam else f"layers.{2 * config.adaptor.depth - 2}"],
                        sample(golden.image_embeds[:1])) < 1e-6  # fmt: skip
    assert not load_golden(tmp_path / "r/goldens/01.safetensors").taps


def test_taps_do_not_depend_on_how_a_chain_reads(
    siglip_pair: OraclePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call gives a row of logits, so that a reference in longer chunks would have other taps."""
    record(siglip_pair, tmp_path / "r", 300)
    golden, chain = load_golden(tmp_path / "r/goldens/00.safetensors"), chain_of(siglip_pair, tmp_path, True)
    monkeypatch.setattr("runtimes.goldens.taps.PREFILL_CHUNK", 24)
    found = []
    for chain.prefill_chunk in (8, 2048):
        found.append(record_taps(chain, golden, "decoder"))
    assert found[0]["head"].size > 3 * siglip_pair.checkpoint.config.decoder.vocab_size
    for name, taps in found[0].items():
        assert np.array_equal(taps, found[1][name])


def test_samples_favor_no_axis() -> None:
    """A wrong channel, row or plane of a large tensor is hit about as often as its share."""
    shape = (40, 60, 300)
    for axis in range(3):
        wrong = np.zeros(shape, np.float32)
        np.moveaxis(wrong, axis, 0)[7] = 1
        assert sample(wrong).mean() == pytest.approx(1 / shape[axis], rel=0.15)
    assert len(sample(np.zeros(shape))) == SAMPLES
    small = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert sample(small).tolist() == list(range(12))


def test_rounding_costs_what_half_precision_costs(pair: OraclePair, tmp_path: Path) -> None:
    """Between one rounding (2**-12 of a value's size) and many, at every tap of every component."""
    record(pair, tmp_path / "r", 300, tapped=True)
    golden = load_golden(tmp_path / "r/goldens/00.safetensors")
    chain = planned_chain(
        QuantizedWeights(pair.checkpoint, load_precision("fp16")), tmp_path / "r/table.safetensors", True
    )
    for component, taps in golden.taps.items():
        found = record_taps(chain, golden, component)
        for name, expected in taps.items():
            assert 5e-5 < relative_rms(found[name], expected) < 5e-3, (component, name)


def test_what_goldens_take_is_known_before(pair: OraclePair, tmp_path: Path) -> None:
    """To the byte, but for headers, tokens, and taps that have fewer values than are sampled."""
    record(pair, tmp_path / "b", 300)
    found = sum(file.stat().st_size for file in (tmp_path / "b/goldens").glob("*.safetensors"))
    contracts = (component_contract(pair.model.config, name, "fp32") for name in TAPPED_COMPONENTS)
    taps = 4 * SAMPLES * sum(len(contract.taps) for contract in contracts)
    assert 0 < found - (goldens_bytes(pair.model.config) - taps) < 10 * 5000
