"""Random checkpoint configs, ours against transformers.

    python benchmarks/robustness/configs.py --configs 100 --seed 0

Of each variant, as many small random checkpoints are written, many with keys that other models have. Each
must give transformers' vision features, image embeddings and logits within fp32 rounding, or be refused
with one sentence. Exit code 1 says that one deviates, or that ours reads what transformers refuses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.oracles.random_configs import VARIANTS, compare, random_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=int, default=100, help="of each variant")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    given = parser.parse_args()
    faults = 0
    for variant in VARIANTS:
        outcomes: Counter[str] = Counter()
        for seed in range(given.seed, given.seed + given.configs):
            raw = random_config(seed, variant)
            with TemporaryDirectory() as folder:
                try:
                    outcomes[compare(raw, Path(folder))] += 1
                except AssertionError as error:
                    faults += 1
                    print(f"FAULT {variant} {seed}: {error}\n  {json.dumps(raw)}")
        print(f"{variant}: {', '.join(f'{count} {name}' for name, count in sorted(outcomes.items()))}")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
