"""Sampling of the next token: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.errors import UserError
from runtimes.structured.response_format import AnyFormat, ResponseFormat, to_response_format

NOT_ALLOWED = np.float32(-np.inf)  # the logit of a token that the response format excludes
TOP_P_CANDIDATES = 256  # tokens among which the top-p set is searched first


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation.

    Args:
        max_new_tokens: largest number of tokens of the answer, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p, in (0, 1].
        repetition_penalty: logits of tokens in the prompt or the answer are divided (positive) or
            multiplied (negative) by it (CTRL, arXiv 1909.05858); 1 is off.
        seed: seed of the sampling; the same seed gives the same answer.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: continue after the end-of-sentence token, to measure speed.
        logprobs: report the log probability of each token and of this many most likely
            alternatives; None reports nothing.
        drafts: use speculative tokens, proposed from repeated text and verified several per call.
            A token is accepted only if the rounding of such a call cannot change it, so the answer
            stays the same.
        response_format: the form that the answer must have: a ``ResponseFormat``, or a JSON Schema
            as a dictionary, a pydantic model, or the Path of a file. Other tokens get the
            probability 0 before the other options apply.

    Raises:
        UserError: a value is outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    drafts: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    response_format: AnyFormat = None

    @property
    def format(self) -> ResponseFormat | None:
        """The response format, which ``__post_init__`` has converted."""
        assert self.response_format is None or isinstance(self.response_format, ResponseFormat)
        return self.response_format

    def __post_init__(self) -> None:
        """Convert the response format, and validate the values."""
        object.__setattr__(self, "response_format", to_response_format(self.response_format))
        checks = [
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (self.temperature >= 0, "temperature must not be negative"),
            (self.top_k >= 0, "top_k must not be negative"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty must be positive"),
            (not isinstance(self.stop, str), "stop must be a tuple of strings, not one string"),
            (all(self.stop), "stop strings must not be empty"),
            (self.seed >= 0, "seed must not be negative"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs must not be negative"),
        ]
        for valid, message in checks:
            if not valid:
                raise UserError(f"{message[0].upper()}{message[1:]}.")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities before the sampling options apply.

    With a response format, they are those of the allowed tokens; a forced token has 0.

    Args:
        token: the token of the answer.
        logprob: its log probability.
        top: the most likely tokens and their log probabilities, in descending order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_logits(cls, token: int, logits: np.ndarray, count: int) -> TokenLogprobs:
        """Compute the entry of ``token`` and the ``count`` most likely tokens of ``logits [V]``.

        A token whose logit is minus infinity is not allowed and not listed.
        """
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        best = (
            [item for item in top_k_indices(scores, count).tolist() if scores[item] > -np.inf]
            if count
            else []
        )
        return cls(token, float(scores[token]), tuple((item, float(scores[item])) for item in best))


def top_k_indices(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` largest of ``scores [V]``, in descending order.

    Equal scores are ordered by index. Only the largest are sorted, which takes a tenth of the time
    for 102,400 scores.
    """
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    threshold = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= threshold)
    best: np.ndarray = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return best


def top_p_indices(probabilities: np.ndarray, mass: float) -> np.ndarray:
    """Return the indices of the fewest of ``probabilities [V]`` that add up to ``mass``.

    The indices are in descending order of probability.
    """
    count = TOP_P_CANDIDATES
    while True:
        best = top_k_indices(probabilities, count)
        sums = np.cumsum(probabilities[best])
        if sums[-1] >= mass or count >= len(probabilities):
            return best[: int(np.searchsorted(sums, mass)) + 1]
        count *= 8


class Sampler:
    """Samples the tokens of one sequence, with a random state of its own."""

    def __init__(self, options: GenerationOptions) -> None:
        """Seed the random state from the options."""
        self.options = options
        self._random = np.random.default_rng(options.seed)
        self._drawn: float | None = None  # a random number that no token has used yet

    def pick(self, logits: np.ndarray, seen: Sequence[int], allowed: np.ndarray | None = None) -> int:
        """Sample the next token.

        Args:
            logits: ``[V]`` float32.
            seen: tokens of the prompt and the answer, for the repetition penalty.
            allowed: which tokens are allowed, ``[V]`` bool; None allows all.

        Raises:
            UserError: the logits hold NaN or infinity.
        """
        token, _ = self._choose(logits, seen, allowed)
        self._drawn = None
        return token

    def pick_if_certain(
        self, logits: np.ndarray, seen: Sequence[int], deviation: float, allowed: np.ndarray | None = None
    ) -> int | None:
        """Sample like ``pick``, or return None if slightly different logits could change the token.

        The random state does not advance if the result is None.

        Args:
            logits: ``[V]`` float32.
            seen: tokens of the prompt and the answer, for the repetition penalty.
            deviation: largest difference of the other logits from these.
            allowed: which tokens are allowed, ``[V]`` bool; None allows all.
        """
        token, margin = self._choose(logits, seen, allowed)
        if margin <= 2 * deviation * max(
            self.options.repetition_penalty, 1 / self.options.repetition_penalty
        ):
            return None
        self._drawn = None
        return token

    def _choose(
        self, logits: np.ndarray, seen: Sequence[int], allowed: np.ndarray | None
    ) -> tuple[int, float]:
        """Return a token, and how much the difference of two logits must change for another one."""
        if not np.isfinite(logits).all():
            raise UserError("The decoder gave NaN or infinite logits; run parity to see which stage fails.")
        options = self.options
        if allowed is not None:
            logits = np.where(allowed, logits, NOT_ALLOWED)
        if options.repetition_penalty != 1 and len(seen):
            logits = logits.copy()
            ids = np.unique(np.asarray(seen, dtype=np.int64))
            scores = logits[ids]
            penalty = options.repetition_penalty
            logits[ids] = np.where(scores > 0, scores / penalty, scores * penalty)
        if options.temperature == 0:
            token = int(logits.argmax())
            others = max(logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf))
            return token, float(logits[token]) - float(others)
        kept = top_k_indices(logits, options.top_k) if options.top_k else np.arange(len(logits))
        scores = logits[kept].astype(np.float64)
        with np.errstate(over="ignore"):  # at very small temperatures
            weights = np.exp((scores - scores.max()) / options.temperature)
        weights /= weights.sum()
        if options.top_p < 1:
            best = top_p_indices(weights, options.top_p)
            kept, weights = kept[best], weights[best] / weights[best].sum()
        if self._drawn is None:
            self._drawn = self._random.random()
        sums = weights.cumsum()
        sums /= sums[-1]
        place = int(sums.searchsorted(self._drawn, side="right"))  # as numpy's Generator.choice
        if options.top_k or options.top_p < 1:
            return int(kept[place]), 0.0  # the set of tokens and its order may change as well
        below = float(sums[place - 1]) if place else 0.0
        return int(kept[place]), options.temperature * _odds_margin(self._drawn, below, float(sums[place]))


def _odds_margin(drawn: float, below: float, above: float) -> float:
    """Distance in log odds of ``drawn`` from the ends of a token's cumulative probability interval.

    Logits that differ by at most d change the log odds of a set of tokens by at most
    2 d / temperature.
    """
    shares = np.array([below, drawn, min(above, 1.0)])
    with np.errstate(divide="ignore", invalid="ignore"):
        low, at, high = np.log(shares) - np.log1p(-shares)
        return float(np.minimum(at - low, high - at))
