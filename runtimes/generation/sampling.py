"""From logits to the next token: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.errors import UserError

NUCLEUS = 256  # tokens among which the top-p set is looked for first


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate.

    Args:
        max_new_tokens: upper bound of the answer's length, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches p, in (0, 1].
        repetition_penalty: logits of tokens already in the prompt or answer are divided (positive)
            or multiplied (negative) by it (CTRL, arXiv 1909.05858); 1 is off.
        seed: of the sampling; the same seed gives the same answer.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on past the end of the answer, as far as the other bounds reach; for measuring speed.
        logprobs: report the log probability of each token, and of so many of the likeliest in its place;
            None reports nothing.
        drafts: guess tokens from what the text repeats and judge several in one call. A guess counts only
            where the rounding of such a call cannot change the choice, so that the answer is the same.
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

    def __post_init__(self) -> None:
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
        for holds, sentence in checks:
            if not holds:
                raise UserError(f"{sentence[0].upper()}{sentence[1:]}.")


@dataclass(frozen=True)
class TokenLogprobs:
    """The natural logarithm of a token's probability before sampling options, and the likeliest ``top``."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, token: int, logits: np.ndarray, count: int) -> TokenLogprobs:
        """Of ``logits [V]``."""
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        best = likeliest(scores, count).tolist() if count else []
        return cls(token, float(scores[token]), tuple((each, float(scores[each])) for each in best))


def likeliest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` largest of ``scores [V]``, the largest first, of equal ones the first.

    Only these are sorted: of 102,400 that takes a tenth of the time.
    """
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, -count)[-count]
    found = np.flatnonzero(scores >= least)
    best: np.ndarray = found[np.argsort(-scores[found], kind="stable")][:count]
    return best


def nucleus(weights: np.ndarray, mass: float) -> np.ndarray:
    """Places of the fewest of ``weights [V]``, which add up to 1, that reach ``mass``; the largest first."""
    count = NUCLEUS
    while True:
        best = likeliest(weights, count)
        sums = np.cumsum(weights[best])
        if sums[-1] >= mass or count >= len(weights):
            return best[: int(np.searchsorted(sums, mass)) + 1]
        count *= 8


class Sampler:
    """Picks tokens for one sequence; keeps its own random state."""

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)
        self._drawn: float | None = None  # a random number that no token has used yet

    def pick(self, logits: np.ndarray, seen: Sequence[int]) -> int:
        """Next token from ``logits [V]`` float32; ``seen`` are the tokens to penalise.

        Raises:
            UserError: the logits hold NaN or infinity.
        """
        token, _ = self._choose(logits, seen)
        self._drawn = None
        return token

    def pick_if_certain(self, logits: np.ndarray, seen: Sequence[int], deviation: float) -> int | None:
        """As ``pick``; None, and nothing is used up, where other logits could give another token.

        Args:
            deviation: the largest difference of each of the other logits from these.
        """
        token, margin = self._choose(logits, seen)
        if margin <= 2 * deviation * max(
            self.options.repetition_penalty, 1 / self.options.repetition_penalty
        ):
            return None
        self._drawn = None
        return token

    def _choose(self, logits: np.ndarray, seen: Sequence[int]) -> tuple[int, float]:
        """A token, and by how much two logits must move apart or together for another one."""
        if not np.isfinite(logits).all():
            raise UserError("The decoder gave NaN or infinite logits; run parity to see which stage breaks.")
        options = self.options
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
        kept = likeliest(logits, options.top_k) if options.top_k else np.arange(len(logits))
        scores = logits[kept].astype(np.float64)
        with np.errstate(over="ignore"):  # of the smallest temperatures
            weights = np.exp((scores - scores.max()) / options.temperature)
        weights /= weights.sum()
        if options.top_p < 1:
            best = nucleus(weights, options.top_p)
            kept, weights = kept[best], weights[best] / weights[best].sum()
        if self._drawn is None:
            self._drawn = self._random.random()
        sums = weights.cumsum()
        sums /= sums[-1]
        place = int(sums.searchsorted(self._drawn, side="right"))  # as numpy's Generator.choice
        if options.top_k or options.top_p < 1:
            return int(kept[place]), 0.0  # which tokens are kept, and in which order, may change as well
        below = float(sums[place - 1]) if place else 0.0
        return int(kept[place]), options.temperature * _odds_margin(self._drawn, below, float(sums[place]))


def _odds_margin(drawn: float, below: float, above: float) -> float:
    """How far ``drawn`` lies inside a token's share ``below`` to ``above`` of all probability, in log odds.

    Logits that differ by at most d change the log odds of a set of tokens by at most 2 d / temperature.
    """
    shares = np.array([below, drawn, min(above, 1.0)])
    with np.errstate(divide="ignore", invalid="ignore"):
        low, at, high = np.log(shares) - np.log1p(-shares)
        return float(np.minimum(at - low, high - at))
