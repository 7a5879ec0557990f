"""Plant random faults into a bundle and see which of them parity and the audit pass.

    python benchmarks/robustness/planted_faults.py --faults 1000 --output faults.json

The bundle is the tiny model for ONNX Runtime in the precisions asked for. A fault that parity passes is
harmful where it changes one of 60 answers, or raises the mean Kullback-Leibler divergence from the reference
above three times the sound artifact's (and ``KL_FLOOR`` nats, below which fp32's own rounding lies). Each
fault is drawn from its number, so a run can be repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.robustness.random_faults import plant
from dsvl_export.audit import audit
from dsvl_export.exporting import export
from dsvl_export.ladder import parity
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.session import reference_chain
from reference.tiny import HELDOUT
from runtimes.bundle import MANIFEST, Bundle
from runtimes.errors import UserError
from runtimes.measures import kl_divergence
from runtimes.pipeline import Pipeline
from runtimes.prompt import Message
from runtimes.task import TaskItem, load_task, run_task

BACKEND = "onnxruntime"
ANSWERS = 60
KL_FLOOR = 1e-6
LONG = "The numbers are 7, 12, 41 and 88. " * 60  # reaches the end of the cache with the picture's tokens


def questions() -> list[TaskItem]:
    """Held-out questions, spread over all of them."""
    items = load_task(HELDOUT)
    return items[:: len(items) // ANSWERS][:ANSWERS]


def logits_of(pipeline: Pipeline, items: list[TaskItem]) -> list[np.ndarray]:
    """Logits ``[K, V]`` at places of some prompts, the last of which is long."""
    asked = [(item.messages, item.images) for item in items[::6]]
    asked.append(([Message("user", LONG)], items[0].images))
    found = []
    for messages, images in asked:
        chain = pipeline.chain
        text = pipeline.format(messages, len(images))
        embeds = chain.embed(chain.prepare(text, images))[: pipeline.capacity]
        cache = chain.decoder.new_cache(1, pipeline.capacity)
        rows = np.unique(np.linspace(8, len(embeds) - 1, 12).astype(int))
        found.append(chain.decoder.decode(embeds[None], rows, cache)[0])
    return found


def divergence(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Mean Kullback-Leibler divergence in nats; infinite where there are other rows, or NaN."""
    if [item.shape for item in expected] != [item.shape for item in found]:
        return float("inf")
    mean = float(
        np.mean(np.concatenate([kl_divergence(*pair) for pair in zip(expected, found, strict=True)]))
    )
    return mean if np.isfinite(mean) else float("inf")


class Judge:
    """What a sound bundle answers in a precision, and whether a spoiled one does harm."""

    def __init__(self, bundle: Bundle, source: Checkpoint, precision: str) -> None:
        self.items, self.source, self.precision = questions(), source, precision
        manifest = bundle.manifest
        chain = reference_chain(source, bundle.path(manifest.token_embedding))
        reference = Pipeline(chain, manifest.prompt.system_prompt, manifest.default_capacity)
        self.reference = logits_of(reference, self.items)
        sound = Pipeline.open(bundle, BACKEND, precision)
        self.answers = run_task(sound, self.items, lambda: None).answers
        self.sound = divergence(self.reference, logits_of(sound, self.items))

    def judge(self, folder: Path) -> dict[str, Any]:
        """Verdicts and, where no stage but that of single layers fails, the harm that is done."""
        row: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            result = parity(Bundle.open(folder), BACKEND, self.precision)
            row["parity"] = result.verdict
            row["stages"] = [rung.name for rung in result.rungs if rung.state == "failed"]
        except UserError as error:
            row["parity"] = f"refused: {error}"
        row["parity_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        try:
            row["audit"] = audit(Bundle.open(folder), self.source, BACKEND, self.precision).verdict
        except UserError as error:
            row["audit"] = f"refused: {error}"
        row["audit_seconds"] = time.perf_counter() - started
        if row["parity"] == "passed" or row.get("stages") == ["layers"]:
            pipeline = Pipeline.open(folder, BACKEND, self.precision)
            answers = run_task(pipeline, self.items, lambda: None).answers
            row["kl"] = divergence(self.reference, logits_of(pipeline, self.items))
            row["changed"] = sum(one != other for one, other in zip(answers, self.answers, strict=True))
            row["harmful"] = row["kl"] > 3 * max(self.sound, KL_FLOOR) or row["changed"] > 0
        return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--precisions", default="fp32,fp16,int8,int8-int4,8da4w")
    parser.add_argument(
        "--bundle", type=Path, help="a bundle of tiny that has these precisions; it is copied"
    )
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    precisions = options.precisions.split(",")
    source = open_checkpoint("tiny")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        if options.bundle:
            shutil.copytree(options.bundle, folder)
        bundle = Bundle.open(folder) if options.bundle else export("tiny", folder, BACKEND, precisions)
        judges = {precision: Judge(bundle, source, precision) for precision in precisions}
        manifest = (folder / MANIFEST).read_bytes()
        sound = Path(temporary) / "sound"
        shutil.copytree(folder, sound)
        for seed in range(options.first, options.first + options.faults):
            precision = precisions[seed % len(precisions)]
            what, files = plant(folder, BACKEND, precision, seed)
            row = {"seed": seed, "precision": precision, "fault": what, **judges[precision].judge(folder)}
            rows.append(row)
            for file in files:
                shutil.copyfile(sound / file.relative_to(folder), file)
            (folder / MANIFEST).write_bytes(manifest)
            options.output.write_text(json.dumps({"rows": rows, "sound_kl": {
                name: judge.sound for name, judge in judges.items()}}, indent=1))  # fmt: skip
            shown = {key: value for key, value in row.items() if not key.endswith("seconds")}
            print(json.dumps(shown), flush=True)
    summary(rows)


def summary(rows: list[dict[str, Any]]) -> None:
    """A table of what passes whole requests, the check of single layers, and the audit."""
    print(
        "| precision | faults | pass the stages | harmful | pass parity | harmful | pass parity and audit |"
    )
    print("|---|---|---|---|---|---|---|")
    for precision in [*dict.fromkeys(row["precision"] for row in rows), "all"]:
        some = [row for row in rows if precision in (row["precision"], "all")]
        stages = [row for row in some if "harmful" in row]
        parity = [row for row in stages if row["parity"] == "passed"]
        both = sum(row["audit"] == "passed" for row in parity)
        harmful = [sum(row["harmful"] for row in kept) for kept in (stages, parity)]
        counts = (len(some), len(stages), harmful[0], len(parity), harmful[1], both)
        print(f"| {precision} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
