"""Prompt lookup: proposes the tokens that followed the same n-gram earlier as speculative tokens.

A proposal costs a dictionary lookup, and the decoder verifies all of its tokens in one call. Text
that repeats the prompt or the answer (documents, tables, code) is therefore decoded several tokens
per call. The text is the same as without speculation: speculative decoding (arXiv 2211.17192), with
proposals by n-grams as in Saxena's prompt-lookup decoding (2023). ``runtimes.generation.decoding``
verifies the tokens; the timing in this module affects only the speed.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must be the same
FIRST_SIZE, MAX_SIZE = 2, 16  # speculative tokens of a call: at first, and after accepted ones
SUSPENSION, MAX_SUSPENSION = 16, 256  # tokens without speculation, after it has lost time
MAX_LOSS = 0.5  # plain steps that speculation may lose before it is suspended
SMOOTHING = 0.25  # weight of the newest plain step in the mean of their seconds


class PromptLookup:
    """Proposes speculative tokens for one sequence, as long as they save time.

    A call that verifies speculative tokens takes longer than a plain step of one token; by how much
    depends on the backend and the machine. Calls are therefore timed, and the time that speculation
    saves or loses against plain steps is added up. When it has lost half a plain step, speculation
    is suspended, twice as long each time.
    """

    def __init__(self, tokens: Sequence[int], max_size: int, image_token_id: int) -> None:
        """Index the prompt.

        Args:
            tokens: token ids of the prompt.
            max_size: largest number of speculative tokens of a call; 0 disables speculation.
            image_token_id: the token of image positions, which is never proposed.
        """
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → position after its last occurrence
        self._max_size, self._image_token_id = min(max_size, MAX_SIZE), image_token_id
        self._size = FIRST_SIZE
        self._plain_seconds = 0.0  # mean of a plain step, without the first, which may be cold
        self._plain_steps = 0
        # Whether the last tokens were rejected; a plain step follows, to keep their mean current.
        self._rejected = False
        self._saved_seconds = 0.0  # since the last suspension
        self._suspension, self._resume_at = SUSPENSION, 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the answer."""
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens) - 1
            if end >= NGRAM:  # the n-gram before this token; nothing follows the newest one yet
                self._after[tuple(self._tokens[end - NGRAM : end])] = end

    def propose(self, max_tokens: int) -> list[int]:
        """Return at most ``max_tokens`` speculative tokens.

        There are none if the last n-gram is new, or while speculation is suspended.
        """
        if self._rejected or not self._plain_seconds:
            return []
        if len(self._tokens) < max(self._resume_at, NGRAM):
            return []
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        if start is None:
            return []
        size = min(self._size, self._max_size, max(max_tokens, 0))
        tokens = self._tokens[start : start + size]
        if self._image_token_id in tokens:
            return tokens[: tokens.index(self._image_token_id)]
        return tokens

    def disable(self) -> None:
        """Propose no more tokens."""
        self._max_size = 0

    def record_call(self, proposed: int, accepted: int, seconds: float) -> None:
        """Record the outcome of a decode call.

        Args:
            proposed: number of speculative tokens.
            accepted: how many of them were accepted.
            seconds: duration of the call.
        """
        self._rejected = proposed > 0 and not accepted
        if not proposed:
            self._plain_steps += 1
            if self._plain_steps > 1:
                weight = SMOOTHING if self._plain_seconds else 1
                self._plain_seconds += (seconds - self._plain_seconds) * weight
            return
        self._size = min(2 * self._size, MAX_SIZE) if accepted == proposed else FIRST_SIZE
        saved = self._saved_seconds + (1 + accepted) * self._plain_seconds - seconds
        self._saved_seconds = min(saved, 4 * self._plain_seconds)
        if self._saved_seconds >= self._plain_seconds:
            self._suspension = SUSPENSION
        elif self._saved_seconds < -MAX_LOSS * self._plain_seconds:
            self._saved_seconds, self._resume_at = 0.0, len(self._tokens) + self._suspension
            self._suspension = min(2 * self._suspension, MAX_SUSPENSION)
