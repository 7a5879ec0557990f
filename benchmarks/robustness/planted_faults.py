"""Plant random faults into a bundle and see which of them parity and the audit pass.

    python benchmarks/robustness/planted_faults.py --faults 600 --output faults.json
    python benchmarks/robustness/planted_faults.py --backend coreml --faults 200 --output coreml.json

The bundle is the tiny model in a backend's precisions, in turn. A fault that parity passes is harmful where
it changes one of 60 answers, or raises the mean Kullback-Leibler divergence from the reference above three
times the sound artifact's (and ``KL_FLOOR`` nats, below which fp32's own rounding lies). Each fault is drawn
from its number, so a run can be repeated; the same command goes on with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.robustness.faults import plant
from dsvl_export.audit import audit
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.session import reference_chain
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.goldens.metrics import kl_divergence
from runtimes.goldens.task import TaskItem, load_task, run_task
from runtimes.pipeline import Pipeline
from runtimes.text.prompt import Message

PRECISIONS = {
    "onnxruntime": ["fp32", "fp16", "int8", "int8-int4", "8da4w"],
    "openvino": ["fp32", "bf16", "int8", "int4"],
    "coreml": ["fp16", "int8", "int4"],
    "executorch": ["fp32", "8da4w"],
}
ANSWERS = 60
OF_FILES = {"layers", "audit"}  # stages that look at the files, beside those that send requests
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

    def __init__(self, bundle: Bundle, source: Checkpoint, backend: str, precision: str) -> None:
        self.items, self.source, self.backend, self.precision = questions(), source, backend, precision
        manifest = bundle.manifest
        chain = reference_chain(source, bundle.path(manifest.token_embedding))
        reference = Pipeline(chain, manifest.prompt.system_prompt, manifest.default_capacity)
        self.reference = logits_of(reference, self.items)
        sound = Pipeline.open(bundle, backend, precision, threads=1)
        self.answers = run_task(sound, self.items, lambda: None).answers
        self.sound = divergence(self.reference, logits_of(sound, self.items))

    def judge(self, folder: Path) -> dict[str, Any]:
        """The verdict, and of what no stage sees that sends requests, the harm it does."""
        row: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            result = parity(Bundle.open(folder), self.backend, self.precision, threads=1)
            row["parity"] = result.verdict
            row["stages"] = [stage.name for stage in result.stages if stage.state == "failed"]
        except UserError as error:
            row["parity"] = f"refused: {error}"
        row["parity_seconds"] = round(time.perf_counter() - started, 2)
        if row["parity"] != "passed" and not set(row.get("stages", ["refused"])) <= OF_FILES:
            return row
        pipeline = Pipeline.open(folder, self.backend, self.precision, threads=1)
        answers = run_task(pipeline, self.items, lambda: None).answers
        row["kl"] = divergence(self.reference, logits_of(pipeline, self.items))
        row["changed"] = sum(one != other for one, other in zip(answers, self.answers, strict=True))
        row["harmful"] = row["kl"] > 3 * max(self.sound, KL_FLOOR) or row["changed"] > 0
        if row["parity"] == "passed":
            try:
                row["audit"] = audit(Bundle.open(folder), self.source, self.backend, self.precision).verdict
            except UserError as error:
                row["audit"] = f"refused: {error}"
        return row


class Worker:
    """A process that plants faults into a copy of the bundle of its own, and restores it."""

    def __init__(self, sound: Path, folder: Path, backend: str, precisions: list[str]) -> None:
        torch.set_num_threads(1)
        self.sound, self.folder, self.backend, self.precisions = sound, folder, backend, precisions
        shutil.copytree(sound, folder)
        bundle, source = Bundle.open(folder), open_checkpoint("tiny")
        self.judges = {precision: Judge(bundle, source, backend, precision) for precision in precisions}

    def run(self, seed: int) -> dict[str, Any]:
        precision = self.precisions[seed % len(self.precisions)]
        what, files = plant(self.folder, self.backend, precision, seed)
        judge = self.judges[precision]
        row = {"seed": seed, "precision": precision, "fault": what, **judge.judge(self.folder)}
        for file in [*files, self.folder / MANIFEST]:
            shutil.copyfile(self.sound / file.relative_to(self.folder), file)
        return row | {"sound_kl": judge.sound}


_worker: Worker


def _start(sound: Path, backend: str, precisions: list[str]) -> None:
    global _worker
    _worker = Worker(sound, sound.parent / f"copy-{os.getpid()}", backend, precisions)


def _run(seed: int) -> dict[str, Any]:
    return _worker.run(seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=list(PRECISIONS), default="onnxruntime")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--precisions", help="separated by commas; default: those of the backend")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the faults in it are not run again")
    options = parser.parse_args()
    precisions = options.precisions.split(",") if options.precisions else PRECISIONS[options.backend]
    rows: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else []
    done = {row["seed"] for row in rows}
    seeds = [seed for seed in range(options.first, options.first + options.faults) if seed not in done]
    with tempfile.TemporaryDirectory() as temporary:
        sound = Path(temporary) / "sound"
        bundle = export("tiny", sound, options.backend, precisions)
        precisions = [precision for _, precision in bundle.choices()]
        pool = ProcessPoolExecutor(
            options.workers, get_context("spawn"), _start, (sound, options.backend, precisions)
        )
        with pool:
            for row in pool.map(_run, seeds):
                rows.append(row)
                options.output.write_text(json.dumps(rows, indent=1))
                print(json.dumps(row, ensure_ascii=False), flush=True)
    summary(rows)
    sys.exit(any(row.get("harmful") and row["parity"] == "passed" for row in rows))


def summary(rows: list[dict[str, Any]]) -> None:
    """What passes the stages that send requests, those and the layers, all of parity, and the audit too."""

    def passing(kept: list[dict[str, Any]], *stages: str) -> str:
        left = [row for row in kept if "harmful" in row and not set(stages) & set(row["stages"])]
        return f"{len(left)} ({sum(row['harmful'] for row in left)})"

    print(
        "| precision | faults | pass the requests (harmful) | and the layers | and the audit | and verify |"
    )
    print("|---|---|---|---|---|---|")
    for precision in [*dict.fromkeys(row["precision"] for row in rows), "all"]:
        some = [row for row in rows if precision in (row["precision"], "all")]
        counts = [passing(some), passing(some, "layers"), passing(some, *OF_FILES)]
        audited = [row for row in some if row["parity"] == "passed" and row["audit"] == "passed"]
        print(f"| {precision} | {len(some)} | {' | '.join(counts)} | {passing(audited)} |")


if __name__ == "__main__":
    main()
