"""The tensors that the stages compare, computed by the artifacts of a bundle.

The input of each stage is the reference's own, so that errors of the stages do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runtimes.chain import Chain
from runtimes.goldens.golden import Golden, teacher_forced_logits
from runtimes.preprocess import to_pixel_values

STEPS = 8  # single decode steps per golden whose logits are judged


@dataclass(frozen=True)
class StageTensor:
    """One tensor of one stage, as the artifact and as the reference compute it."""

    stage: str
    name: str
    actual: np.ndarray
    expected: np.ndarray


def stage_tensors(chain: Chain, golden: Golden, steps: int = 0) -> Iterator[StageTensor]:
    """Yield the tensors of all stages of one golden, from vision encoder to teacher-forced logits.

    Args:
        chain: the components to run.
        golden: inputs, and outputs of the reference.
        steps: number of tokens that are also decoded one by one; a decode step may use another
            kernel, program or profile than a prefill.
    """
    yield from vision_tensors(chain, golden)
    embeds = chain.merge(golden.prompt_tokens, golden.image_embeds)
    cache = chain.decoder.new_cache(1, len(embeds) + steps)
    logits = chain.prefill(embeds, cache)[None]
    yield StageTensor("prefill_logits", "logits", logits, golden.logits[:1])
    if steps:
        rows = [chain.decode(np.array([[token]]), cache)[0, 0] for token in golden.greedy_tokens[:steps]]
        yield StageTensor(
            "teacher_forced_logits", "step_logits", np.stack(rows), golden.logits[1 : steps + 1]
        )
    logits = teacher_forced_logits(chain, embeds, golden.greedy_tokens.tolist())
    yield StageTensor("teacher_forced_logits", "logits", logits, golden.logits)


def vision_tensors(chain: Chain, golden: Golden) -> Iterator[StageTensor]:
    """Yield the vision features and the image embeddings of one golden."""
    pixels = np.stack([to_pixel_values(square, chain.preprocessing) for square in golden.squares])
    features = chain.encode_pixels(pixels)
    for name, expected in golden.features.items():
        yield StageTensor("vision_encoder", name, features[name], expected)
    inputs = {
        item.name: golden.features[item.name].astype(item.dtype) for item in chain.adaptor.contract.inputs
    }
    yield StageTensor("adaptor", "image_embeds", chain.adapt(inputs), golden.image_embeds)
