"""What calibration keeps of activations, and the ranges chosen from it."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.observers import BIN_COUNT, TensorStatistics, bin_edges, hash_rows, histogram
from calibration.ranges import find_amax


def parts(count: int = 7) -> list[TensorStatistics]:
    rng = np.random.default_rng(3)
    return [
        TensorStatistics.from_values(
            (rng.standard_normal((40, 6)) * 2.0 ** rng.integers(-9, 9)).astype("f"), f"s{i}", 64
        )
        for i in range(count)
    ]


def merged(items: list[TensorStatistics]) -> TensorStatistics:
    result = items[0]
    for item in items[1:]:
        result = result.merged(item, 64)
    return result


def test_statistics_merge_exactly_in_any_order() -> None:
    whole = merged(parts())
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order = rng.permutation(7)
        cut = int(rng.integers(1, 6))
        items = [parts()[index] for index in order]
        again = merged([merged(items[:cut]), merged(items[cut:])])
        assert (again.count, again.minimum, again.maximum) == (whole.count, whole.minimum, whole.maximum)
        for name in ("counts", "channel_max", "keys", "rows"):
            assert np.array_equal(getattr(again, name), getattr(whole, name)), name
        assert again.digest == whole.digest
    assert whole.counts.sum() == whole.count == 7 * 240
    assert len(whole.rows) == 64


def test_statistics_survive_a_file() -> None:
    seen = parts(1)[0]
    again = TensorStatistics.from_tensors(seen.to_tensors())
    assert again.digest == seen.digest
    assert np.array_equal(again.rows, seen.rows)
    assert np.array_equal(again.keys, seen.keys)
    assert (again.count, again.minimum, again.maximum) == (seen.count, seen.minimum, seen.maximum)


def test_bins_are_where_their_edges_say() -> None:
    edges = bin_edges()
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(5000) * 2.0 ** rng.integers(-20, 20, 5000)).astype(np.float32)
    expected, _ = np.histogram(np.abs(values.astype(np.float64)), edges)
    assert np.array_equal(histogram(values), expected)
    assert histogram(np.zeros(3, np.float32))[0] == 3
    assert histogram(np.full(2, 1e30, np.float32))[BIN_COUNT - 1] == 2
    assert np.all(np.diff(edges)[1:] / edges[1:-1] <= 1 / 256)


def test_kept_rows_are_a_fair_sample() -> None:
    keys = hash_rows("sample", 20_000)
    assert len(set(keys.tolist())) == 20_000
    places = np.sort(np.argsort(keys)[:2000])
    assert abs(np.mean(places) / 20_000 - 0.5) < 0.03
    assert not set(keys.tolist()) & set(hash_rows("other", 20_000).tolist())


def test_ranges() -> None:
    """Of a bell with one outlier: minmax takes it, the others cut it as a search over the values would."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((50_000, 1)).astype("f")
    values[0] = 40.0
    seen = TensorStatistics.from_values(values, "s", 0)
    assert find_amax(seen, "minmax") == 40.0
    exact = float(np.quantile(np.abs(values), 0.999))
    assert find_amax(seen, "percentile", 99.9) == pytest.approx(exact, rel=1 / 128)

    def error(amax: float) -> float:
        scale = amax / 127
        return float(np.square(values - np.clip(np.round(values / scale), -127, 127) * scale).sum())

    found = find_amax(seen, "mse")
    best = min(np.linspace(2.5, 40, 300), key=error)
    assert error(found) < 1.02 * error(best)
    assert error(found) < 0.85 * error(40.0)
    assert find_amax(TensorStatistics.from_values(np.zeros((4, 2), np.float32), "s", 0), "mse") == 0


def test_division_is_that_of_the_values() -> None:
    values = np.random.default_rng(2).standard_normal((50, 4)).astype("f")
    factors = np.array([0.5, 1, 2, 8], np.float32)
    divided = TensorStatistics.from_values(values, "s", 64).divided(factors)
    direct = TensorStatistics.from_values(values / factors, "s", 64)
    assert np.array_equal(divided.counts, direct.counts)
    assert np.array_equal(divided.channel_max, direct.channel_max)
    assert divided.amax == direct.amax
