"""ExecuTorch's programs at the released widths and reduced depth: bytes, pieces, the parity check.

    python benchmarks/executorch_programs.py WORK [PRECISION ...]

Checkpoints have random weights (``make_checkpoint.py``). Its speed is in ``decoders.py`` and ``encoders.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import check_parity, checkpoint_of, cost, export_to, measured

DECODER_LAYERS, VISION_LAYERS, VOCABULARY = 1, 2, 1031


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("precisions", nargs="*", default=["fp32", "fp16", "8da8w", "8da4w"])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for size in ("1.3b", "7b"):
        checkpoint = checkpoint_of(given.work, size, DECODER_LAYERS, VISION_LAYERS, VOCABULARY)
        for precision in given.precisions:
            bundle = given.work / f"{size}-widths"
            found = measured(export_to, bundle, checkpoint, "executorch", precision, True)
            print(f"{size} {precision}: {json.dumps(found['result'])}; {cost(found)}", flush=True)
            proof = measured(check_parity, bundle, "executorch", precision)
            print(f"Parity: {json.dumps(proof['result'])} in {cost(proof)}", flush=True)


if __name__ == "__main__":
    main()
