"""Speculation by prompt lookup at full shape: tokens per second with and without it, by kind of text.

    python benchmarks/speculation.py BUNDLE [--backend onnxruntime] [--precision int4]

Precisions that quantize activations have no speculation. The decoder computes every step; a script replaces
its choice of tokens, since the weights are random:

    copy       the answer repeats 200 tokens of the prompt
    quotes     stretches of 12 tokens from the prompt between 12 new ones
    new        only tokens that the prompt lacks
    misleading three tokens of the prompt, then a token that does not follow them there
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import spread

PROMPT, ANSWER, THREADS = 400, 200, 2


class Scripted:
    """A decoder whose logits name the script's next token, whatever it computes."""

    def __init__(self, inside: Any, prompt: int, script: list[int]) -> None:
        self._inside, self._prompt, self._script = inside, prompt, script
        self.contract, self.max_logit_rows, self.tapped = inside.contract, inside.max_logit_rows, {}

    def new_cache(self, batch: int, capacity: int) -> Any:
        return self._inside.new_cache(batch, capacity)

    def decode(self, embeds: np.ndarray, rows: np.ndarray, cache: Any) -> np.ndarray:
        start = cache.length
        logits: np.ndarray = self._inside.decode(embeds, rows, cache)
        for index, row in enumerate(rows):
            place = min(max(start + int(row) + 1 - self._prompt, 0), len(self._script) - 1)
            logits[0, index, self._script[place]] = logits[0, index].max() + 1
        return logits


def scripts(prompt: list[int], fresh: list[int]) -> dict[str, list[int]]:
    """Answers by name; ``fresh`` are tokens that the prompt lacks."""
    new = iter(fresh)
    quotes: list[int] = []
    misleading: list[int] = []
    for start in range(0, ANSWER, 24):
        quotes += prompt[start : start + 12] + [next(new) for _ in range(12)]
    for start in range(0, ANSWER, 4):
        misleading += [*prompt[start : start + 3], next(new)]
    return {
        "copy": prompt[50 : 50 + ANSWER],
        "quotes": quotes[:ANSWER],
        "new": [next(new) for _ in range(ANSWER)],
        "misleading": misleading[:ANSWER],
    }


def main() -> None:
    from runtimes.generation.decoding import SpeculativeSequence, generate
    from runtimes.generation.sampling import GenerationOptions
    from runtimes.pipeline import Pipeline

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--precision")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    pipeline = Pipeline.open(given.bundle, given.backend, given.precision, threads=THREADS, verify=False)
    chain, spec = pipeline.chain, pipeline.chain.tokenizer.spec
    decoder, words = chain.decoder, len(chain.embedding.rows)
    plain = [word for word in range(min(words, 4000)) if word not in (spec.eos_id, spec.image_token_id)]
    order = np.random.default_rng(0).permutation(plain).tolist()
    prompt, fresh = order[:PROMPT], order[PROMPT:]
    print(
        "| | tokens/s without | with speculation | ratio | proposed | accepted |\n|---|---|---|---|---|---|"
    )
    for name, script in scripts(prompt, fresh).items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        answer = None
        for _ in range(given.turns):
            for speculate in (False, True):
                chain.decoder = Scripted(decoder, PROMPT, script)
                cache = chain.decoder.new_cache(1, pipeline.capacity)
                logits = chain.prefill(chain.embed_tokens(prompt), cache)
                sequence = SpeculativeSequence(
                    chain, prompt, GenerationOptions(ANSWER, drafts=speculate), 0.0, pipeline.capacity
                )
                for _ in generate(chain, [logits], cache, [sequence]):
                    pass
                answer = sequence.answer
                if answer.tokens != script:
                    raise SystemExit(f"{name}: the answer is not the script")
                rates[speculate].append(answer.tokens_per_second)
        assert answer
        ratios = [new / old for old, new in zip(rates[False], rates[True], strict=True)]
        columns = (spread(rates[False]), spread(rates[True]), spread(ratios))
        print(
            f"| {name} | {' | '.join(columns)} | {answer.drafted_tokens} | {answer.accepted_tokens} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
