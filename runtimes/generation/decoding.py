"""The decoding loop: from the logits of a prompt to a streamed answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from time import perf_counter

import numpy as np

from runtimes.cache import KVCache
from runtimes.chain import Chain
from runtimes.generation.answer import Answer, SequenceDecoder
from runtimes.generation.sampling import GenerationOptions
from runtimes.generation.speculation import PromptLookup
from runtimes.structured.grammars import Grammar

MASKS = ThreadPoolExecutor(1, "masks")  # computes masks of response formats while a decoder runs


# Limits of speculation, in nats. Logits of a multi-token call round differently from those of a
# single-token call. Speculation is used while they deviate by at most MAX_DEVIATION. A token is
# accepted if a deviation of SAFETY_FACTOR times the measured one, and at least MIN_DEVIATION, could
# not change it. Measured on tiny: 2e-5 in fp32, 6e-5 with quantized weights, 4e-3 in fp16 (which
# ONNX Runtime's CPU kernels widen).
MAX_DEVIATION, MIN_DEVIATION, SAFETY_FACTOR = 0.01, 0.05, 4


class SpeculativeSequence:
    """One sequence while it is decoded, with speculative tokens where they save time.

    Speculation never changes the answer: a row of a multi-token call is used only if the choice of
    its token is certain for the logits of a single-token call as well. The first speculative tokens
    are only a measurement: the last token is decoded again by itself, which gives the deviation
    between the two kinds of calls. A row whose choice is not certain is also decoded again. If the
    deviation is too large, or activations are quantized (``Chain.exact_rows``), no tokens are
    proposed.

    Tokens that a response format forces are not decoded one by one: the next call has all of them,
    and computes only the logits after the last.

    Between two calls, the cache holds the prompt and all tokens of the answer but the last, or but
    the last and the forced ones after it.
    """

    def __init__(
        self,
        chain: Chain,
        prompt: Sequence[int],
        options: GenerationOptions,
        started: float,
        capacity: int,
        grammar: Grammar | None = None,
    ) -> None:
        """Start an answer.

        Args:
            chain: the components that decode it.
            prompt: token ids of the prompt.
            options: how to sample.
            started: ``perf_counter()`` when the request began.
            capacity: tokens of the KV cache.
            grammar: the compiled response format of the options.
        """
        self._decoder = SequenceDecoder(chain.tokenizer, options, prompt, capacity, grammar)
        self._started, self._pending = started, 1
        # top_k and top_p select by rank, and rounding may change the rank: no choice is certain.
        certain = options.temperature == 0 or not (options.top_k or options.top_p < 1)
        speculate = options.drafts and certain and chain.exact_rows
        max_size = chain.decoder.max_logit_rows - 1 if speculate else 0
        self._lookup = PromptLookup(prompt, max_size, chain.tokenizer.spec.image_token_id)
        self._proposed: list[int] = []  # speculative tokens of the last call
        self._accepted = 0  # how many of them were accepted
        self._lookup_length = 0  # tokens of the answer that the lookup has
        self._deviation: float | None = None  # of multi-token calls, once measured
        self._uncertain: np.ndarray | None = None  # [V] logits of a token to be decoded again

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._decoder.answer

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._decoder.finished

    @property
    def constrained(self) -> bool:
        """Whether the answer has a response format."""
        return self._decoder.constrained

    @property
    def pending_tokens(self) -> int:
        """Number of tokens of the last call that are part of the answer already."""
        return self._pending

    def compute_mask(self) -> None:
        """Compute which tokens may come next; any thread may call this while the decoder runs."""
        self._decoder.compute_mask()

    def input_tokens(self, cache: KVCache, speculate: bool = True) -> list[int]:
        """Return the tokens to decode next.

        They are the last token, the tokens that the response format forced after it and, if they
        save time, speculative ones. Logits are needed from the last token that is not speculative
        on (``pending_tokens``).

        Args:
            cache: the KV cache of this sequence.
            speculate: whether speculative tokens are allowed.
        """
        answer = self.answer
        self._lookup.extend(answer.tokens[self._lookup_length :])
        self._lookup_length = len(answer.tokens)
        pending = answer.tokens[cache.length - answer.prompt_tokens :]
        self._pending, self._proposed = len(pending), []
        if speculate and self._uncertain is None:
            room = cache.capacity - cache.length - len(pending) + 1
            free = min(room, self._decoder.remaining_tokens) - 1
            self._proposed = self._decoder.accepted_prefix(self._lookup.propose(free))
        return [*pending, *self._proposed]

    def accept_logits(self, rows: np.ndarray, cache: KVCache, seconds: float | None = None) -> str:
        """Sample from the logits of ``input_tokens`` or of the prompt; return the new text.

        Args:
            rows: logits ``[K, V]`` from the last token on that is not speculative.
            cache: the KV cache of this sequence; rejected tokens are rewound.
            seconds: duration of the call, from which follows whether speculation saves time.
        """
        answer = self.answer
        if self._proposed:
            text, measuring = self._verify(rows, cache), self._deviation is None
        else:
            text, measuring = self._decoder.append_token(rows[0]), False
            if self._uncertain is not None:
                self._measure(rows[0])
        answer.seconds = perf_counter() - self._started
        answer.first_token_seconds = answer.first_token_seconds or answer.seconds
        if seconds is not None and not measuring and self._pending == 1:
            self._lookup.record_call(len(self._proposed), self._accepted, seconds)
        return text

    def _verify(self, rows: np.ndarray, cache: KVCache) -> str:
        """Accept what is certain of ``rows [K, V]``, and rewind the cache by the rest."""
        answer, before, text = self.answer, len(self.answer.tokens), ""
        if self._deviation is not None:
            deviation = max(SAFETY_FACTOR * self._deviation, MIN_DEVIATION)
            text = self._decoder.accept_speculative(rows, self._proposed, deviation)
        new = answer.tokens[before:]
        pairs = zip(new, self._proposed, strict=False)
        self._accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache.rewind(len(self._proposed) - min(self._accepted, len(new) - 1))
        answer.drafted_tokens += len(self._proposed)
        answer.accepted_tokens += self._accepted
        if not self.finished and new == self._proposed[: len(new)]:
            self._uncertain = rows[len(new)]
        return text

    def _measure(self, logits: np.ndarray) -> None:
        """Compare the uncertain logits with those ``[V]`` of a single-token call."""
        assert self._uncertain is not None
        deviation = float(np.abs(logits - self._uncertain).max())
        self._deviation, self._uncertain = max(deviation, self._deviation or 0.0), None
        if self._deviation > MAX_DEVIATION:
            self._lookup.disable()


def decode_step(
    chain: Chain, cache: KVCache, active: Mapping[int, SpeculativeSequence]
) -> tuple[list[np.ndarray], float | None]:
    """Decode the last token of the sequences in some rows of a cache, in one call.

    Only a single sequence is decoded with speculative tokens. Sequences with forced tokens are
    decoded by themselves. The idle rows between the others are decoded too and then rewound. An
    idle row that is full loses its last token.

    Args:
        chain: the components that decode.
        cache: the KV cache of all sequences.
        active: the sequences by row, in ascending order.

    Returns:
        the logits ``[K, V]`` of each sequence and, if there is only one sequence, the seconds of
        the call: the arguments of ``SpeculativeSequence.accept_logits``.
    """
    alone = len(active) == 1
    inputs = {row: each.input_tokens(cache.row(row), speculate=alone) for row, each in active.items()}
    constrained = [sequence for sequence in active.values() if sequence.constrained]
    masks = MASKS.submit(_compute_masks, constrained) if constrained else None
    try:
        begun = perf_counter()
        together = {row: tokens[0] for row, tokens in inputs.items() if len(tokens) == 1 and not alone}
        logits = _decode_together(chain, cache, together) if together else {}
        for row in inputs.keys() - together.keys():
            logits[row] = _decode_alone(chain, cache.row(row), inputs[row], active[row].pending_tokens)
        return [logits[row] for row in active], perf_counter() - begun if alone else None
    finally:
        if masks:
            masks.result()


def _compute_masks(sequences: Sequence[SpeculativeSequence]) -> None:
    for sequence in sequences:
        sequence.compute_mask()


def _decode_alone(chain: Chain, cache: KVCache, tokens: Sequence[int], pending: int) -> np.ndarray:
    """Decode the input tokens of one sequence, many forced ones in pieces.

    Returns:
        logits ``[K, V]`` from the last of the ``pending`` tokens on.
    """
    while pending > chain.prefill_chunk:
        piece, tokens = tokens[: chain.prefill_chunk], tokens[chain.prefill_chunk :]
        chain.decode(np.array([piece]), cache, len(piece) - 1)
        pending -= len(piece)
    logits: np.ndarray = chain.decode(np.array([tokens]), cache, pending - 1)[0]
    return logits


def _decode_together(chain: Chain, cache: KVCache, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
    """Decode one token in some rows of a cache, in one call; return their logits ``[1, V]``."""
    first, last = min(tokens), max(tokens)
    span = cache.rows(first, last + 1)
    inputs = np.zeros((span.batch, 1), np.int64)
    idle = np.ones(span.batch, bool)
    for row, token in tokens.items():
        inputs[row - first] = token
        idle[row - first] = False
    span.lengths[idle] = np.minimum(span.lengths[idle], span.capacity - 1)
    kept = span.lengths.copy()
    try:
        logits = chain.decode(inputs, span)
        return {row: logits[row - first] for row in tokens}
    finally:
        span.lengths[idle] = kept[idle]


def generate(
    chain: Chain,
    logits: Sequence[np.ndarray],
    cache: KVCache,
    sequences: Sequence[SpeculativeSequence],
) -> Iterator[list[str]]:
    """Decode the sequences in the rows of a cache until all have ended.

    Args:
        chain: the components that decode.
        logits: ``[V]`` after the prompt of each sequence.
        cache: the KV cache; it holds the prompts.
        sequences: one per row of the cache.

    Yields:
        the new text of each sequence, step by step.
    """
    active = dict(enumerate(sequences))
    step_logits = [row[None] for row in logits]
    seconds: float | None = None
    while True:
        texts = [""] * len(sequences)
        for (row, sequence), rows in zip(active.items(), step_logits, strict=True):
            texts[row] = sequence.accept_logits(rows, cache.row(row), seconds)
        yield texts
        active = {row: sequence for row, sequence in active.items() if not sequence.finished}
        if not active:
            return
        step_logits, seconds = decode_step(chain, cache, active)
