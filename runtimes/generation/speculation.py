"""Prompt-lookup drafting: what followed the same tokens before is guessed to follow them again.

The guess costs a dictionary lookup; the decoder judges all of it in one call. So text that repeats what the
prompt or the answer already holds (documents, tables, code) comes several tokens a call, and is the text that
would have come one by one (speculative decoding, arXiv 2211.17192; drafts by n-grams as in Saxena's
prompt-lookup decoding, 2023). ``runtimes.generation.decoding``
sees to that; the clock here decides about speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must be the same
FIRST, MOST = 2, 16  # tokens of a draft: at first, and after drafts that came true
PAUSE, LONGEST_PAUSE = 16, 256  # tokens without drafts, after they have lost time
LOSS = 0.5  # plain steps that drafts may lose before they pause
SMOOTHING = 0.25  # weight of the newest plain step in the mean of their seconds


class PromptLookup:
    """Drafts for one sequence, as long as they save time.

    A call that judges a draft takes longer than a plain one, by how much depends on the backend and the
    machine. So calls are timed: what drafts have won or lost against plain steps is summed up, and once they
    have lost half a plain step they pause, twice as long each time.

    Args:
        tokens: the prompt.
        longest: the most tokens of a draft; 0 makes none.
        never: the token that stands for images, which no answer holds.
    """

    def __init__(self, tokens: Sequence[int], longest: int, never: int) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where the token behind its last occurrence is
        self._longest, self._never = min(longest, MOST), never
        self._size = FIRST
        self._plain = 0.0  # mean seconds of a plain step, the first one, which may be cold, left out
        self._timed = 0  # plain steps
        self._wrong = False  # the last draft was; a plain step follows it, so that their mean stays true
        self._won = 0.0  # seconds, since the last pause
        self._pause, self._resume_at = PAUSE, 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that are certain."""
        for token in tokens:
            self._tokens.append(token)
            known = len(self._tokens) - 1
            if known >= NGRAM:  # the n-gram before this token; the newest one has no token behind it yet
                self._after[tuple(self._tokens[known - NGRAM : known])] = known

    def draft(self, room: int) -> list[int]:
        """Tokens that may follow, at most ``room``; none where nothing repeats or drafts do not pay."""
        if self._wrong or not self._plain or len(self._tokens) < max(self._resume_at, NGRAM):
            return []
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        if start is None:
            return []
        found = self._tokens[start : start + min(self._size, self._longest, max(room, 0))]
        return found[: found.index(self._never)] if self._never in found else found

    def stop(self) -> None:
        """Make no more drafts."""
        self._longest = 0

    def judge(self, drafted: int, accepted: int, seconds: float) -> None:
        """What became of a call: tokens drafted, those of them that came true, and the time it took."""
        self._wrong = drafted > 0 and not accepted
        if not drafted:
            self._timed += 1
            if self._timed > 1:
                self._plain += (seconds - self._plain) * (SMOOTHING if self._plain else 1)
            return
        self._size = min(2 * self._size, MOST) if accepted == drafted else FIRST
        self._won = min(self._won + (1 + accepted) * self._plain - seconds, 4 * self._plain)
        if self._won >= self._plain:
            self._pause = PAUSE
        elif self._won < -LOSS * self._plain:
            self._won, self._resume_at = 0.0, len(self._tokens) + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
