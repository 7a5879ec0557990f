"""Recording of taps: each component of a chain runs once on the request of a golden.

The chain's sessions must be debug builds. A fixed sample of the values of each tap is kept, so that
the taps of the 66 layers of the 7B fit into 20 MB.
"""

from __future__ import annotations

import numpy as np

from runtimes.bundle.mixes import COMPONENTS
from runtimes.chain import PREFILL_CHUNK, Chain
from runtimes.goldens.golden import Golden
from runtimes.preprocess import to_pixel_values

TAPPED_COMPONENTS = COMPONENTS
SAMPLES = 1 << 16
Taps = dict[str, np.ndarray]  # name → sampled values


def sample(array: np.ndarray) -> np.ndarray:
    """Flatten an array, and sample ``SAMPLES`` values if it has more.

    The positions depend only on the size of the array. They are hashed (splitmix64, Steele et al.
    2014), so that no axis is favored: a wrong channel, token or window is sampled in proportion to
    its size.

    Returns:
        ``[min(size, SAMPLES)]`` float32.
    """
    flat = array.reshape(-1)
    if flat.size <= SAMPLES:
        return flat.astype(np.float32)
    places = (hashed_numbers(SAMPLES) % np.uint64(flat.size)).astype(np.int64)
    return flat[places].astype(np.float32)


def hashed_numbers(count: int) -> np.ndarray:
    """Return ``count`` deterministic uint64 numbers: splitmix64 of 0, 1, 2, and so on."""
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def record_taps(chain: Chain, golden: Golden, component: str) -> Taps:
    """Run a component on the reference's input and sample its taps, in order of execution."""
    if component == "vision_encoder":
        pixels = to_pixel_values(golden.squares[0], chain.preprocessing)
        tapped = chain.encode_pixels(pixels[None])
    elif component == "adaptor":
        inputs = chain.adaptor.contract.inputs
        tapped = chain.adaptor.run(
            {item.name: golden.features[item.name][:1].astype(item.dtype) for item in inputs}
        )
    else:
        tapped = _tap_decoder(chain, golden)
    contract = getattr(chain, component).contract
    return {spec.name: sample(tapped[spec.name]) for spec in contract.taps}


def record_all_taps(chain: Chain, golden: Golden) -> dict[str, Taps]:
    """Record the taps of every component of a chain of debug builds."""
    return {component: record_taps(chain, golden, component) for component in TAPPED_COMPONENTS}


def _tap_decoder(chain: Chain, golden: Golden) -> Taps:
    """Decode the prompt in prefill chunks, the last of 8 and 1 tokens, which read the cache.

    The chunks are the same for all chains, because each call returns a row of logits.
    """
    embeds = chain.merge(golden.prompt_tokens, golden.image_embeds)
    cache, parts, end = chain.decoder.new_cache(1, len(embeds)), [], len(embeds) - 9
    borders = [*range(PREFILL_CHUNK, end, PREFILL_CHUNK), end, end + 8]
    for chunk in np.split(embeds, borders):
        chain.decoder.decode(chunk[None], np.array([len(chunk) - 1]), cache)
        parts.append(chain.decoder.tapped)
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
