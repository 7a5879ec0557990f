"""The generation loop: from the prompt's logits to a streamed answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from runtimes.cache import KVCache
from runtimes.chain import Chain
from runtimes.generation.sampling import GenerationOptions, Sampler, TokenLogprobs
from runtimes.generation.speculation import PromptLookup
from runtimes.text.tokenizer import Tokenizer


@dataclass
class Answer:
    """A generated answer and its statistics.

    ``finish_reason``: ``eos``, ``stop`` (a stop string), ``length`` (max_new_tokens) or
    ``capacity`` (the cache is full). Of ``drafted_tokens``, which were guessed and judged several in a
    call, ``accepted_tokens`` are in the answer. ``logprobs`` has one entry per token where they were
    asked for. Times are seconds.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the first token (which is prefill) left out; 0 for a single token."""
        spent = self.seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / spent if len(self.tokens) > 1 and spent > 0 else 0.0


class Writer:
    """Turns one sequence's tokens into text, and knows when the answer ends."""

    def __init__(self, tokenizer: Tokenizer, options: GenerationOptions, prompt: Sequence[int]) -> None:
        self.answer = Answer(prompt_tokens=len(prompt))
        self._stream, self._eos_ids, self._options = tokenizer.stream(), tokenizer.spec.eos_ids, options
        self._sampler, self._seen = Sampler(options), list(prompt)
        self._held = ""  # text that may turn out to be the start of a stop string

    @property
    def finished(self) -> bool:
        return bool(self.answer.finish_reason)

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self._options.max_new_tokens - len(self.answer.tokens)

    def push(self, logits: np.ndarray) -> str:
        """Pick a token from ``logits [V]``; returns the text that is now certain."""
        return self._write(self._sampler.pick(logits, self._seen), logits)

    def _write(self, token: int, logits: np.ndarray) -> str:
        self._seen.append(token)
        answer = self.answer
        answer.tokens.append(token)
        if self._options.logprobs is not None:
            answer.logprobs.append(TokenLogprobs.of(token, logits, self._options.logprobs))
        if token in self._eos_ids and not self._options.ignore_eos:
            return self.finish("eos")
        self._held += self._stream.push(token)
        stops = [at for at in map(self._held.find, self._options.stop) if at >= 0]
        if stops:
            self._held = self._held[: min(stops)]
            return self.finish("stop")
        if len(answer.tokens) >= self._options.max_new_tokens:
            return self.finish("length")
        return self._release(len(self._held) - self._stop_prefix())

    def follow(self, rows: np.ndarray, draft: Sequence[int], deviation: float) -> str:
        """Pick a token from each of ``rows [K, V]`` for as long as the draft ``[K - 1]`` comes true.

        It ends before a row whose choice is not certain.

        Args:
            deviation: by which the logits of single calls may differ from ``rows``.
        """
        text = ""
        for row, guess in zip(rows, [*draft, None], strict=True):
            token = self._sampler.pick_if_certain(row, self._seen, deviation)
            if token is None:
                break
            text += self._write(token, row)
            if self.finished or token != guess:
                break
        return text

    def finish(self, reason: str) -> str:
        """End the answer; returns what was held back."""
        self.answer.finish_reason = reason
        if reason != "stop":
            self._held += self._stream.flush()
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if not self.answer.text:
            text = text.lstrip()  # the space between "Assistant:" and the answer
        self.answer.text += text
        return text

    def _stop_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._options.stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._options.stop):
                return size
        return 0


# Speculation, in nats. A call of several tokens rounds otherwise than one of a single token. It is used where
# its logits deviate by at most MOST_DEVIATION, and a choice counts where a deviation of SAFETY times what was
# measured, and at least LEAST_DEVIATION, could not change it. Measured on tiny: 2e-5 in fp32, 6e-5 with
# quantized weights, 4e-3 in fp16 (which ONNX Runtime's CPU kernels widen).
MOST_DEVIATION, LEAST_DEVIATION, SAFETY = 0.01, 0.05, 4


class Decoding:
    """One sequence while it is decoded: which tokens come next, and what becomes of their logits.

    A draft never changes what is chosen: its rows count only where the choice is certain for the logits of
    a single-token call as well. The first draft measures how much those differ, as its last token is decoded
    again by itself; so does each row whose choice was not certain. Where they differ too much, and where
    activations are quantized (``Chain.exact_rows``), no drafts are made.

    Between two calls the cache holds the prompt and all tokens of the answer but the last.

    Args:
        prompt: its tokens.
        started: ``perf_counter()`` when the request began.
    """

    def __init__(
        self, chain: Chain, prompt: Sequence[int], options: GenerationOptions, started: float
    ) -> None:
        self.writer, self._started = Writer(chain.tokenizer, options, prompt), started
        # top_k and top_p choose by an order that rounding may change, so that no choice is certain.
        certain = options.temperature == 0 or not (options.top_k or options.top_p < 1)
        drafts = options.drafts and certain and chain.exact_rows
        longest = chain.decoder.most_rows - 1 if drafts else 0
        self._lookup = PromptLookup(prompt, longest, chain.tokenizer.spec.image_token_id)
        self._draft: list[int] = []
        self._accepted = 0  # tokens of the last draft
        self._known = 0  # tokens of the answer that the lookup has
        self._deviation: float | None = None  # measured, of a draft's logits from single-token calls'
        self._uncertain: np.ndarray | None = None  # [V] logits of a draft that are to be decoded again

    def tokens(self, cache: KVCache, drafts: bool = True) -> list[int]:
        """The last token and, where they pay, a draft of what follows; all are to be decoded."""
        answer = self.writer.answer
        self._lookup.extend(answer.tokens[self._known :])
        self._known = len(answer.tokens)
        self._draft = []
        if drafts and self._uncertain is None:
            self._draft = self._lookup.draft(min(cache.capacity - cache.length, self.writer.left) - 1)
        return [answer.tokens[-1], *self._draft]

    def take(self, rows: np.ndarray, cache: KVCache, seconds: float | None = None) -> str:
        """The new text that ``rows [K, V]``, the logits of those tokens or of the prompt, make certain.

        Args:
            cache: of this sequence alone; wrong tokens are taken back.
            seconds: that the call took, for the lookup to judge its drafts by.
        """
        answer = self.writer.answer
        if self._draft:
            text, measuring = self._follow(rows, cache), self._deviation is None
        else:
            text, measuring = self.writer.push(rows[0]), False
            if self._uncertain is not None:
                self._measure(rows[0])
        if not self.writer.finished and cache.length >= cache.capacity:
            text += self.writer.finish("capacity")
        answer.seconds = perf_counter() - self._started
        answer.first_token_seconds = answer.first_token_seconds or answer.seconds
        if seconds is not None and not measuring:
            self._lookup.judge(len(self._draft), self._accepted, seconds)
        return text

    def _follow(self, rows: np.ndarray, cache: KVCache) -> str:
        """Take what is certain of a draft's ``rows [K, V]``; the cache keeps all tokens but the last."""
        answer, before, text = self.writer.answer, len(self.writer.answer.tokens), ""
        if self._deviation is not None:
            deviation = max(SAFETY * self._deviation, LEAST_DEVIATION)
            text = self.writer.follow(rows, self._draft, deviation)
        new = answer.tokens[before:]
        cache.rewind(len(rows) - len(new))
        self._accepted = sum(token == guess for token, guess in zip(new, self._draft, strict=False))
        answer.drafted_tokens += len(self._draft)
        answer.accepted_tokens += self._accepted
        if not self.writer.finished and new == self._draft[: len(new)]:
            self._uncertain = rows[len(new)]
        return text

    def _measure(self, logits: np.ndarray) -> None:
        """Compare the uncertain logits with those ``[V]`` of a single-token call."""
        assert self._uncertain is not None
        deviation = float(np.abs(logits - self._uncertain).max())
        self._deviation, self._uncertain = max(deviation, self._deviation or 0.0), None
        if self._deviation > MOST_DEVIATION:
            self._lookup.stop()


def decode_step(
    chain: Chain, cache: KVCache, active: Mapping[int, Decoding]
) -> tuple[list[np.ndarray], float | None]:
    """Decode the last token of the sequences in some rows of a cache, in one call.

    A single sequence is decoded with a draft; several are decoded without drafts. The idle rows between them
    are decoded too, and then rewound. A full idle row loses its last token.

    Args:
        active: by row, in ascending order.

    Returns:
        logits ``[K, V]`` of each sequence, and the seconds of the call if there is one sequence: the
        arguments of ``Decoding.take``.
    """
    first, last = min(active), max(active)
    span = cache.rows(first, last + 1)
    if len(active) == 1:
        tokens = np.array([active[first].tokens(span)])
        begun = perf_counter()
        return [chain.decode(tokens, span)[0]], perf_counter() - begun
    tokens = np.zeros((span.batch, 1), np.int64)
    idle = np.ones(span.batch, bool)
    for row, decoding in active.items():
        tokens[row - first] = decoding.tokens(cache.row(row), drafts=False)
        idle[row - first] = False
    span.lengths[idle] = np.minimum(span.lengths[idle], span.capacity - 1)
    kept = span.lengths.copy()
    try:
        return list(chain.decode(tokens, span)[~idle]), None
    finally:
        span.lengths[idle] = kept[idle]


def generate(
    chain: Chain, logits: Sequence[np.ndarray], cache: KVCache, decodings: Sequence[Decoding]
) -> Iterator[list[str]]:
    """Decode the sequences in the rows of a cache until each has ended; yields each one's new text per step.

    Args:
        logits: ``[V]`` of each after its prompt.
        cache: the prompts are in it.
    """
    active = dict(enumerate(decodings))
    found = [row[None] for row in logits]
    seconds: float | None = None
    while True:
        pieces = [""] * len(decodings)
        for (row, decoding), rows in zip(active.items(), found, strict=True):
            pieces[row] = decoding.take(rows, cache.row(row), seconds)
        yield pieces
        active = {row: decoding for row, decoding in active.items() if not decoding.writer.finished}
        if not active:
            return
        found, seconds = decode_step(chain, cache, active)
