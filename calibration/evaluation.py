"""What a change to the model does to its answers: KL divergence of the logits, and whole answers kept.

The reference answers once; a changed model is then judged with those answers teacher-forced. An answer is
kept where every token of it, its end included, is still the first choice: just then would the changed model
have given the same answer by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.data import Sample
from calibration.statistics import ask
from reference.checkpoint.checkpoint import Checkpoint
from reference.model.deepseek_vl import DeepSeekVL
from reference.session import reference_chain
from runtimes.chain import Chain
from runtimes.goldens.golden import greedy_decode, teacher_forced_logits
from runtimes.goldens.metrics import kl_divergence
from runtimes.images import ImageSource

ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Cost:
    """Mean KL divergence in nats per token, and the share of answers that are kept."""

    kl: float
    kept: float


@dataclass(frozen=True)
class _Answered:
    prompt: str
    images: tuple[ImageSource, ...]
    embeds: np.ndarray  # [S, D], of the reference
    tokens: list[int]  # of the answer, with its end
    logits: np.ndarray  # [len(tokens), V], of the reference


class Evaluation:
    """Samples with the fp32 reference's answers, to judge changed models by.

    Args:
        model: the reference.
        on_step: called with the samples that are answered and their number.
    """

    def __init__(
        self,
        source: Checkpoint,
        embedding_file: Path,
        samples: Sequence[Sample],
        model: DeepSeekVL,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._source, self._embedding_file = source, embedding_file
        chain = reference_chain(source, embedding_file, model)
        self._answered = []
        for index, sample in enumerate(samples):
            on_step(index, len(samples))
            self._answered.append(_answer(chain, sample))
        on_step(len(samples), len(samples))

    def cost(self, model: DeepSeekVL, kv_cache: str = "float", vision: bool = True) -> Cost:
        """What a changed model costs.

        Args:
            kv_cache: precision of its cache.
            vision: whether anything before the decoder changed; else the reference's embeddings are used.
        """
        chain = reference_chain(self._source, self._embedding_file, model, kv_cache=kv_cache)
        divergences, kept = [], 0
        for item in self._answered:
            embeds = chain.embed_prompt(item.prompt, item.images) if vision else item.embeds
            logits = teacher_forced_logits(chain, embeds, item.tokens)
            divergences.append(kl_divergence(item.logits, logits))
            kept += int((logits.argmax(-1) == np.array(item.tokens)).all())
        return Cost(float(np.concatenate(divergences).mean()), kept / len(self._answered))


def _answer(chain: Chain, sample: Sample) -> _Answered:
    prompt = ask(chain, sample)
    embeds = chain.embed_prompt(prompt, sample.images)
    (tokens,), (logits,) = greedy_decode(chain, [embeds], ANSWER_TOKENS)
    row = tokens.tolist()
    ends = [place for place, token in enumerate(row) if token in chain.tokenizer.spec.eos_ids]
    row = row[: ends[0] + 1] if ends else row
    return _Answered(prompt, sample.images, embeds, row, logits[: len(row)])
