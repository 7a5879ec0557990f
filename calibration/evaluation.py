"""Evaluation of changed models: KL divergence of the logits, and the share of answers kept.

The reference answers every sample once; a changed model is then run with those answers
teacher-forced. An answer is kept if each of its tokens, the end token included, has the largest
logit. Exactly then the changed model would generate the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.data import Sample
from calibration.statistics import ANSWER_TOKENS, format_sample_prompt
from reference.checkpoint.checkpoint import Checkpoint
from reference.model.deepseek_vl import DeepSeekVL
from reference.session import reference_chain
from runtimes.chain import Chain
from runtimes.goldens.golden import greedy_decode, teacher_forced_logits
from runtimes.goldens.metrics import kl_divergence
from runtimes.images import ImageSource


@dataclass(frozen=True)
class Cost:
    """Mean KL divergence in nats per token, and the share of answers kept."""

    kl: float
    kept: float


@dataclass(frozen=True)
class _ReferenceAnswer:
    """A sample with the reference's embeddings, answer and logits."""

    prompt: str
    images: tuple[ImageSource, ...]
    embeds: np.ndarray  # [S, D]
    tokens: list[int]  # of the answer, with its end token
    logits: np.ndarray  # [len(tokens), V]


class Evaluation:
    """Samples with the fp32 reference's answers, on which changed models are measured."""

    def __init__(
        self,
        source: Checkpoint,
        embedding_file: Path,
        samples: Sequence[Sample],
        model: DeepSeekVL,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Answer the samples with the reference.

        Args:
            source: the checkpoint.
            embedding_file: the table that ``write_token_embedding`` wrote.
            samples: the requests.
            model: the reference.
            on_step: called with the number of samples answered and in total.
        """
        self._source, self._embedding_file = source, embedding_file
        chain = reference_chain(source, embedding_file, model)
        self._answered = []
        for index, sample in enumerate(samples):
            on_step(index, len(samples))
            self._answered.append(_answer_sample(chain, sample))
        on_step(len(samples), len(samples))

    def measure_cost(self, model: DeepSeekVL, kv_cache: str = "float", vision: bool = True) -> Cost:
        """Measure a changed model.

        Args:
            model: the changed model.
            kv_cache: precision of its cache.
            vision: whether anything before the decoder changed; otherwise the reference's
                embeddings are used.
        """
        chain = reference_chain(self._source, self._embedding_file, model, kv_cache=kv_cache)
        divergences, kept = [], 0
        for item in self._answered:
            embeds = chain.embed_prompt(item.prompt, item.images) if vision else item.embeds
            logits = teacher_forced_logits(chain, embeds, item.tokens)
            divergences.append(kl_divergence(item.logits, logits))
            kept += int((logits.argmax(-1) == np.array(item.tokens)).all())
        return Cost(float(np.concatenate(divergences).mean()), kept / len(self._answered))


def _answer_sample(chain: Chain, sample: Sample) -> _ReferenceAnswer:
    prompt = format_sample_prompt(chain, sample)
    embeds = chain.embed_prompt(prompt, sample.images)
    (tokens,), (logits,) = greedy_decode(chain, [embeds], ANSWER_TOKENS)
    row = tokens.tolist()
    ends = [index for index, token in enumerate(row) if token in chain.tokenizer.spec.eos_ids]
    row = row[: ends[0] + 1] if ends else row
    return _ReferenceAnswer(prompt, sample.images, embeds, row, logits[: len(row)])
