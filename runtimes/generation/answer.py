"""One answer while it is generated: sampling, detokenization, stop strings, forced tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtimes.decode_call import UNLIMITED
from runtimes.generation.sampling import NOT_ALLOWED, GenerationOptions, Sampler, TokenLogprobs
from runtimes.structured.grammars import Constraint, Grammar
from runtimes.text.tokenizer import Tokenizer


@dataclass
class Answer:
    """A generated answer and its statistics.

    Args:
        text: the answer so far.
        tokens: its token ids.
        finish_reason: ``eos`` (also if the response format allows nothing more), ``stop`` (a stop
            string), ``length`` (``max_new_tokens``) or ``capacity`` (the KV cache is full); empty
            while the answer is not complete.
        prompt_tokens: length of the prompt.
        reused_tokens: tokens of the prompt that the KV cache already held.
        drafted_tokens: speculative tokens that were verified.
        accepted_tokens: speculative tokens that are part of the answer.
        forced_tokens: tokens that the response format forced, without a choice.
        logprobs: one entry per token if ``GenerationOptions.logprobs`` is set, else empty.
        first_token_seconds: time from the request to the first token.
        seconds: time from the request to the last token.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed without the first token, which is prefill; 0 for a single token."""
        spent = self.seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / spent if len(self.tokens) > 1 and spent > 0 else 0.0


class SequenceDecoder:
    """Sampling and detokenization of one sequence, until its answer ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        prompt: Sequence[int],
        capacity: int = UNLIMITED,
        grammar: Grammar | None = None,
    ) -> None:
        """Start an empty answer.

        Args:
            tokenizer: the bundle's tokenizer.
            options: how to sample.
            prompt: token ids of the prompt.
            capacity: tokens of the KV cache; an answer of which all tokens but the last fill it
                ends.
            grammar: the compiled response format of the options.
        """
        self.answer = Answer(prompt_tokens=len(prompt))
        self._stream, self._eos_ids = tokenizer.stream(), tokenizer.spec.eos_ids
        self._options, self._capacity = options, capacity
        self._constraint = Constraint(grammar) if grammar else None
        self._sampler, self._seen = Sampler(options), list(prompt)
        self._held = ""  # text that may turn out to be the start of a stop string

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.answer.finish_reason)

    @property
    def constrained(self) -> bool:
        """Whether the answer has a response format."""
        return self._constraint is not None

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that the answer may still have."""
        return self._options.max_new_tokens - len(self.answer.tokens)

    def append_token(self, logits: np.ndarray) -> str:
        """Sample a token from ``logits [V]`` and return the text that is now certain.

        The tokens that the response format forces after it are appended too. If an answer begins
        with forced tokens, none is sampled.
        """
        if not self.answer.tokens and (text := self._append_forced()) is not None:
            return text
        allowed = self._constraint.allowed() if self._constraint else None
        return self._append(self._sampler.pick(logits, self._seen, allowed), logits, allowed)

    def _append(self, token: int, logits: np.ndarray, allowed: np.ndarray | None) -> str:
        """Append a sampled token and the tokens that are forced after it."""
        if self._options.logprobs is not None:
            shown = logits if allowed is None else np.where(allowed, logits, NOT_ALLOWED)
            entry = TokenLogprobs.from_logits(token, shown, self._options.logprobs)
            self.answer.logprobs.append(entry)
        if self._constraint is None or token in self._eos_ids:
            return self._take(token)
        self._constraint.consume([token])
        text = self._take(token, self._constraint.finished)
        return text if self.finished else text + (self._append_forced() or "")

    def _append_forced(self) -> str | None:
        """Append the tokens that the response format forces next; None if there are none."""
        tokens = self._constraint.forced() if self._constraint else []
        if not self._constraint or not tokens:
            return None
        self._constraint.consume(tokens)
        text = ""
        for place, token in enumerate(tokens, 1):
            self.answer.forced_tokens += 1
            if self._options.logprobs is not None:
                top = ((token, 0.0),) if self._options.logprobs else ()
                self.answer.logprobs.append(TokenLogprobs(token, 0.0, top))
            text += self._take(token, place == len(tokens) and self._constraint.finished)
            if self.finished:
                break
        return text

    def _take(self, token: int, complete: bool = False) -> str:
        """Add a token to the answer and return the text that is now certain.

        Args:
            token: the token.
            complete: whether the response format allows nothing after it.
        """
        answer, options = self.answer, self._options
        self._seen.append(token)
        answer.tokens.append(token)
        if token in self._eos_ids and (self._constraint or not options.ignore_eos):
            return self.finish("eos")
        self._held += self._stream.push(token)
        if self._cut_at_stop():
            return self.finish("stop")
        if complete:
            return self.finish("eos")
        if len(answer.tokens) >= options.max_new_tokens:
            return self.finish("length")
        if answer.prompt_tokens + len(answer.tokens) > self._capacity:
            return self.finish("capacity")
        return self._release(len(self._held) - self._stop_prefix())

    def accept_speculative(self, rows: np.ndarray, proposed: Sequence[int], deviation: float) -> str:
        """Sample a token from each of ``rows [K, V]`` until one differs from ``proposed [K - 1]``.

        Stops before the first row for which logits of a single-token call could give another
        token. Proposed tokens that the response format forces need no row.

        Args:
            rows: logits of a call that decoded the last token and the proposed ones.
            proposed: the speculative tokens.
            deviation: largest difference between ``rows`` and the logits of single-token calls.

        Returns:
            the text that is now certain.
        """
        text, tokens, before = "", self.answer.tokens, len(self.answer.tokens)
        while not self.finished:
            done = len(tokens) - before
            if tokens[before:] != list(proposed[:done]):
                break
            allowed = self._constraint.allowed() if self._constraint else None
            token = self._sampler.pick_if_certain(rows[done], self._seen, deviation, allowed)
            if token is None:
                break
            text += self._append(token, rows[done], allowed)
        return text

    def accepted_prefix(self, proposed: list[int]) -> list[int]:
        """Return the first of some proposed tokens that the response format allows."""
        return proposed[: self._constraint.accepted_prefix(proposed)] if self._constraint else proposed

    def compute_mask(self) -> None:
        """Compute which tokens may come next; any thread may call this while the decoder runs."""
        if self._constraint:
            self._constraint.compute_mask()

    def finish(self, reason: str) -> str:
        """End the answer and return the text that was held back."""
        if reason != "stop":
            # A token can be text followed by a part of a character, so the rest may hold a stop.
            self._held += self._stream.flush()
            reason = "stop" if self._cut_at_stop() else reason
        self.answer.finish_reason = reason
        return self._release(len(self._held))

    def _cut_at_stop(self) -> bool:
        """Remove the first stop string in the held text and what follows it, if there is one."""
        stops = [at for at in map(self._held.find, self._options.stop) if at >= 0]
        if stops:
            self._held = self._held[: min(stops)]
        return bool(stops)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if not self.answer.text:  # the space between "Assistant:" and the answer
            if self._constraint is None:
                text = text.lstrip()
            elif self._constraint.skips_space:
                text = text.removeprefix(" ")
        self.answer.text += text
        return text

    def _stop_prefix(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self._options.stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._options.stop):
                return size
        return 0
