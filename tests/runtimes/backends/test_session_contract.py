"""What every backend's decoder session and cache must do; a new backend only joins the fixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtimes.bundle.bundle import Bundle
from runtimes.cache import CapacityError
from runtimes.session import DecoderSession, SessionOptions

CAPACITY = 40


def embeds(decoder: DecoderSession, batch: int, length: int, seed: int = 0) -> np.ndarray:
    spec = decoder.contract.inputs[0]
    random = np.random.default_rng(seed).normal(size=(batch, length, int(spec.shape[2])))
    return (0.5 * random).astype(spec.dtype)


def all_rows(array: np.ndarray) -> np.ndarray:
    return np.arange(array.shape[1])


def close(decoder: DecoderSession, found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the order of accumulation, which differs between shapes."""
    limit = 1e-5 if decoder.contract.inputs[0].dtype == "float32" else 5e-3
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) < limit


def test_contract_of_the_outputs(decoder: DecoderSession) -> None:
    cache, x = decoder.new_cache(1, CAPACITY), embeds(decoder, 1, 6)
    logits = decoder.decode(x, np.array([1, 5]), cache)
    decoder.contract.outputs[0].check(logits)
    assert logits.shape[:2] == (1, 2)
    for spec, array in zip(decoder.contract.states, cache.arrays, strict=True):
        spec.check(array)
        assert array.shape[2] == CAPACITY


def test_logit_rows_choose_rows(decoder: DecoderSession) -> None:
    x = embeds(decoder, 1, 7)
    every = decoder.decode(x, all_rows(x), decoder.new_cache(1, CAPACITY))
    some = decoder.decode(x, np.array([6, 2]), decoder.new_cache(1, CAPACITY))
    assert close(decoder, some[0], every[0, [6, 2]])


@pytest.mark.parametrize("chunks", [(13,), (5, 8), (1,) * 13, (12, 1), (4, 4, 4, 1)])
def test_chunks_equal_one_pass(decoder: DecoderSession, chunks: tuple[int, ...]) -> None:
    x = embeds(decoder, 1, 13)
    whole = decoder.decode(x, all_rows(x), decoder.new_cache(1, 13))
    cache, parts, start = decoder.new_cache(1, CAPACITY), [], 0
    for size in chunks:
        part = x[:, start : start + size]
        parts.append(decoder.decode(part, all_rows(part), cache))
        start += size
    assert cache.length == 13
    assert close(decoder, np.concatenate(parts, axis=1), whole)


def test_past_tokens_matter(decoder: DecoderSession) -> None:
    """The same token after other pasts gives other logits: the tests above compare something."""
    x, y = embeds(decoder, 1, 6), embeds(decoder, 1, 6, seed=1)
    y[:, -1] = x[:, -1]
    one = decoder.decode(x, np.array([5]), decoder.new_cache(1, CAPACITY))
    other = decoder.decode(y, np.array([5]), decoder.new_cache(1, CAPACITY))
    assert not close(decoder, one, other)


def test_rewind_forgets(decoder: DecoderSession) -> None:
    x, wrong = embeds(decoder, 1, 9), embeds(decoder, 1, 5, seed=1)
    expected = decoder.decode(x, np.array([8]), decoder.new_cache(1, CAPACITY))
    cache = decoder.new_cache(1, CAPACITY)
    decoder.decode(x[:, :6], np.array([5]), cache)
    decoder.decode(wrong, np.array([4]), cache)
    cache.rewind(5)
    assert cache.length == 6
    assert close(decoder, decoder.decode(x[:, 6:], np.array([2]), cache), expected)
    with pytest.raises(ValueError, match="cannot rewind"):
        cache.rewind(10)


def test_reset_starts_over(decoder: DecoderSession) -> None:
    x, cache = embeds(decoder, 1, 8), decoder.new_cache(1, CAPACITY)
    first = decoder.decode(x, np.array([7]), cache)
    decoder.decode(embeds(decoder, 1, 3, seed=2), np.array([2]), cache)
    cache.reset()
    assert cache.length == 0
    assert np.array_equal(decoder.decode(x, np.array([7]), cache), first)


def test_capacity_is_refused_before_the_backend_runs(decoder: DecoderSession) -> None:
    cache = decoder.new_cache(1, 8)
    decoder.decode(embeds(decoder, 1, 6), np.array([5]), cache)
    before = [array.copy() for array in cache.arrays]
    with pytest.raises(CapacityError, match="needs 9 positions but the KV cache holds 8"):
        decoder.decode(embeds(decoder, 1, 3), np.array([2]), cache)
    assert cache.length == 6
    assert all(np.array_equal(a, b) for a, b in zip(cache.arrays, before, strict=True))
    decoder.decode(embeds(decoder, 1, 2), np.array([1]), cache)
    assert cache.length == cache.capacity


def test_cache_is_written_in_place(decoder: DecoderSession) -> None:
    """No step copies, moves or grows the states; a step touches only its own positions."""
    cache = decoder.new_cache(1, CAPACITY)
    addresses = cache.addresses
    decoder.decode(embeds(decoder, 1, 5), np.array([4]), cache)
    for step in range(20):
        before = [array.copy() for array in cache.arrays]
        decoder.decode(embeds(decoder, 1, 1, seed=step), np.array([0]), cache)
        for old, new in zip(before, cache.arrays, strict=True):
            changed = np.flatnonzero((old != new).any(axis=(0, 1, 3)))
            assert changed.tolist() == [5 + step]
    assert cache.addresses == addresses


class RecordingBinding:
    """ONNX Runtime's binding, with the names that were bound."""

    def __init__(self, binding: Any, bound: list[str]) -> None:
        self._binding, self._bound = binding, bound

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._binding, name)
        if not name.startswith("bind"):
            return found
        return lambda tensor, *rest: self._bound.append(tensor) or found(tensor, *rest)


def test_onnxruntime_binds_the_cache_once(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes.backends import onnxruntime as backend

    bound: list[str] = []
    file = tiny_bundle.path(tiny_bundle.artifact("decoder", "onnxruntime", "fp32").files[0])
    contract = tiny_bundle.manifest.contracts["fp32"]["decoder"]
    session = backend.open_decoder(file, contract, SessionOptions())
    make = session._session.io_binding
    monkeypatch.setattr(session._session, "io_binding", lambda: RecordingBinding(make(), bound))
    cache = session.new_cache(1, CAPACITY)
    for step in range(20):
        session.decode(embeds(session, 1, 1, seed=step), np.array([0]), cache)
    assert bound.count("key_cache_0") == bound.count("value_cache_3_updated") == 1
    assert bound.count("inputs_embeds") == 20


def test_bad_calls_leave_the_cache_as_it_was(decoder: DecoderSession) -> None:
    cache = decoder.new_cache(1, CAPACITY)
    decoder.decode(embeds(decoder, 1, 2), np.array([1]), cache)
    x = embeds(decoder, 1, 2)
    with pytest.raises(ValueError, match="inputs_embeds must be float.*, got float64"):
        decoder.decode(x.astype(np.float64), np.array([1]), cache)
    with pytest.raises(ValueError, match="inputs_embeds must be float"):
        decoder.decode(x[0], np.array([1]), cache)
    with pytest.raises(ValueError, match="inputs_embeds has 3 rows, but the cache has 1"):
        decoder.decode(embeds(decoder, 3, 1), np.array([0]), cache)
    for rows in ([2], [0, -1]):
        with pytest.raises(ValueError, match=r"the logit rows \[.*\] are out of range for 2 tokens"):
            decoder.decode(x, np.array(rows), cache)
    other: Any = object()
    with pytest.raises(TypeError, match="the session needs a .* from its own new_cache"):
        decoder.decode(x, np.array([1]), other)
    assert cache.length == 2


def test_a_batch_decodes_one_token_a_call(decoder: DecoderSession) -> None:
    """But for the reference, which measures the rounding error of several prompts at once."""
    from reference.session import TorchDecoder  # imports torch; other tests of this file need none

    x, rows, cache = embeds(decoder, 2, 3), np.array([2]), decoder.new_cache(2, CAPACITY)
    if isinstance(decoder, TorchDecoder):
        assert decoder.decode(x, rows, cache).shape[:2] == (2, 1)
        assert cache.lengths.tolist() == [3, 3]
        return
    with pytest.raises(
        ValueError, match=r"several tokens per call need a cache of one row; use cache.row\(\)"
    ):
        decoder.decode(x, rows, cache)
    assert cache.lengths.tolist() == [0, 0]


def test_some_rows_of_a_cache(decoder: DecoderSession) -> None:
    """A view of rows decodes those alone; a prefix is copied from one row to another."""
    assert decoder.max_batch >= 3
    cache, x = decoder.new_cache(3, CAPACITY), embeds(decoder, 1, 9)
    expected = decoder.decode(x, np.array([8]), decoder.new_cache(1, CAPACITY))
    decoder.decode(embeds(decoder, 1, 4, seed=1), np.array([0]), cache.row(0))
    decoder.decode(x[:, :7], np.array([0]), cache.row(1))
    assert cache.row(1) is cache.row(1) and cache.rows(0, 3) is cache
    cache.copy_prefix(1, 2, 6)
    assert cache.lengths.tolist() == [4, 7, 6]
    decoder.decode(x[:, 6:7], np.array([0]), cache.row(2))
    first = [array[:1, :, :4].copy() for array in cache.arrays]
    pair = cache.rows(1, 3)
    for place in (7, 8):
        found = decoder.decode(np.concatenate([x[:, place : place + 1]] * 2), np.array([0]), pair)
    assert close(decoder, found[:1], expected)
    assert close(decoder, found[1:], expected)
    assert cache.lengths.tolist() == [4, 9, 9]
    assert all(np.array_equal(a[:1, :, :4], b) for a, b in zip(cache.arrays, first, strict=True))


def test_a_prefix_is_saved_and_loaded(decoder: DecoderSession) -> None:
    """Also into a cache of another capacity, and into a row that held something else."""
    x, last = embeds(decoder, 1, 9), np.array([0])
    first, second = decoder.new_cache(1, CAPACITY), decoder.new_cache(2, CAPACITY - 2)
    decoder.decode(x[:, :7], np.array([6]), first)
    states = first.save_prefix(6)
    assert {array.shape[2] for array in states} == {6}
    decoder.decode(embeds(decoder, 1, 4, seed=1), np.array([0]), second.row(1))
    second.row(1).load_prefix(states)
    assert second.lengths.tolist() == [0, 6] and first.length == 7
    first.rewind(1)
    for place in (6, 7):
        token = x[:, place : place + 1]
        expected = decoder.decode(token, last, first)
        assert close(decoder, decoder.decode(token, last, second.row(1)), expected)


def test_batch_rows_of_different_lengths(decoder: DecoderSession) -> None:
    """Prefill row by row, decode together: as each sequence alone."""
    lengths, steps = (7, 3, 11), 4
    prompts = [embeds(decoder, 1, n, seed=10 + n) for n in lengths]
    tails = [embeds(decoder, 1, steps, seed=20 + n) for n in lengths]
    cache = decoder.new_cache(len(lengths), CAPACITY)
    for row, prompt in enumerate(prompts):
        decoder.decode(prompt, np.array([0]), cache.row(row))
    assert cache.lengths.tolist() == list(lengths)
    for step in range(steps):
        x = np.concatenate([tail[:, step : step + 1] for tail in tails])
        together = decoder.decode(x, np.array([0]), cache)
        for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
            alone = np.concatenate([prompt, tail[:, : step + 1]], axis=1)
            last = np.array([alone.shape[1] - 1])
            expected = decoder.decode(alone, last, decoder.new_cache(1, CAPACITY))
            assert close(decoder, together[row], expected[0])
