"""Prompt-lookup drafts: tokens that followed an n-gram before are proposed to follow it again.

A draft costs a dictionary lookup, and the decoder verifies all of it in one call. So text that
repeats the prompt or the answer (documents, tables, code) is decoded several tokens per call, and
is the same text as without drafts: speculative decoding (arXiv 2211.17192), with drafts by n-grams
as in Saxena's prompt-lookup decoding (2023). ``runtimes.generation.decoding`` verifies the drafts;
the timing in this module decides only about speed.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must be the same
FIRST_DRAFT, MAX_DRAFT = 2, 16  # tokens of a draft: at first, and after accepted drafts
SUSPENSION, MAX_SUSPENSION = 16, 256  # tokens without drafts, after drafts have lost time
MAX_LOSS = 0.5  # plain steps that drafts may lose before speculation is suspended
SMOOTHING = 0.25  # weight of the newest plain step in the mean of their seconds


class PromptLookup:
    """Drafts for one sequence, as long as they save time.

    A call that verifies a draft takes longer than a plain step of one token; by how much depends on
    the backend and the machine. So calls are timed, and the time that drafts save or lose against
    plain steps is added up. Once they have lost half a plain step, speculation is suspended, twice
    as long each time.
    """

    def __init__(self, tokens: Sequence[int], max_draft: int, image_token_id: int) -> None:
        """Index the prompt.

        Args:
            tokens: token ids of the prompt.
            max_draft: largest number of tokens of a draft; 0 disables drafts.
            image_token_id: the token of image positions, which is never drafted.
        """
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → position after its last occurrence
        self._max_draft, self._image_token_id = min(max_draft, MAX_DRAFT), image_token_id
        self._size = FIRST_DRAFT
        self._plain_seconds = 0.0  # mean of a plain step, without the first, which may be cold
        self._plain_steps = 0
        # Whether the last draft was rejected: a plain step follows, which keeps their mean current.
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

    def draft(self, max_tokens: int) -> list[int]:
        """Propose at most ``max_tokens`` tokens; none if nothing repeats or drafts do not pay."""
        if self._rejected or not self._plain_seconds:
            return []
        if len(self._tokens) < max(self._resume_at, NGRAM):
            return []
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        if start is None:
            return []
        size = min(self._size, self._max_draft, max(max_tokens, 0))
        tokens = self._tokens[start : start + size]
        if self._image_token_id in tokens:
            return tokens[: tokens.index(self._image_token_id)]
        return tokens

    def disable(self) -> None:
        """Make no more drafts."""
        self._max_draft = 0

    def record_call(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record the outcome of a decode call.

        Args:
            drafted: number of speculative tokens.
            accepted: how many of them were accepted.
            seconds: duration of the call.
        """
        self._rejected = drafted > 0 and not accepted
        if not drafted:
            self._plain_steps += 1
            if self._plain_steps > 1:
                weight = SMOOTHING if self._plain_seconds else 1
                self._plain_seconds += (seconds - self._plain_seconds) * weight
            return
        self._size = min(2 * self._size, MAX_DRAFT) if accepted == drafted else FIRST_DRAFT
        saved = self._saved_seconds + (1 + accepted) * self._plain_seconds - seconds
        self._saved_seconds = min(saved, 4 * self._plain_seconds)
        if self._saved_seconds >= self._plain_seconds:
            self._suspension = SUSPENSION
        elif self._saved_seconds < -MAX_LOSS * self._plain_seconds:
            self._saved_seconds, self._resume_at = 0.0, len(self._tokens) + self._suspension
            self._suspension = min(2 * self._suspension, MAX_SUSPENSION)
