"""Statistics of a whole model: collected sample by sample, saved, resumed and merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from calibration.data import Sample
from calibration.folding import foldings
from calibration.observers import TensorStatistics
from calibration.precision_plan import component_layers, layer_kind
from reference.checkpoint.checkpoint import Checkpoint
from reference.model.config import ModelConfig
from reference.session import reference_chain
from reference.trace import TRACED_COMPONENTS
from runtimes.bundle.files import parse_json
from runtimes.bundle.tensor_files import save_tensors
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import greedy_decode
from runtimes.text.prompt import Message, format_chat, place_images

GROUP = 8  # samples whose answers are decoded together
ANSWER_TOKENS = 32
ROWS = 512  # kept of every activation
SAVE_EVERY = 60.0  # seconds
STATISTICS_FILE = "statistics.safetensors"
OnStep = Callable[[int, int], None]


@dataclass
class Statistics:
    """What was seen of each layer's input (``tensors``: layer, or cache, → statistics) in which samples."""

    checkpoint: str  # SHA-256
    keep: int = ROWS
    samples: list[str] = field(default_factory=list)  # digests
    tensors: dict[str, TensorStatistics] = field(default_factory=dict)

    @property
    def data_digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.samples)).encode()).hexdigest()

    def add(self, name: str, seen: TensorStatistics) -> None:
        known = self.tensors.get(name)
        self.tensors[name] = known.merged(seen, self.keep) if known else seen

    def merge(self, other: Statistics) -> None:
        """Take in what another machine collected of other samples.

        Raises:
            UserError: it is of another checkpoint, keeps another number of rows, or shares samples.
        """
        if (self.checkpoint, self.keep) != (other.checkpoint, other.keep):
            raise UserError(
                "Statistics of another checkpoint or with another number of rows cannot be merged."
            )
        shared = set(self.samples) & set(other.samples)
        if shared:
            raise UserError(f"{len(shared)} samples are in both statistics; merge parts of one data set.")
        self.samples += other.samples
        for name, seen in other.tensors.items():
            self.add(name, seen)

    def save(self, file: Path) -> None:
        """Write a file, in one step."""
        tensors = {
            f"{name}/{part}": array
            for name, seen in self.tensors.items()
            for part, array in seen.to_tensors().items()
        }
        texts = {"checkpoint": self.checkpoint, "keep": str(self.keep), "samples": json.dumps(self.samples)}
        try:
            save_tensors(tensors, file, texts)
        except (OSError, SafetensorError) as error:
            raise UserError(f"The statistics {file} cannot be written: {error}.") from error

    @classmethod
    def load(cls, file: Path) -> Statistics:
        """Raises UserError where the file is missing or damaged."""
        try:
            with safe_open(file, framework="np") as handle:
                texts = handle.metadata()
                parts: dict[str, dict[str, np.ndarray]] = {}
                for key in handle.keys():
                    name, _, part = key.rpartition("/")
                    parts.setdefault(name, {})[part] = handle.get_tensor(key)
            tensors = {name: TensorStatistics.from_tensors(row) for name, row in parts.items()}
            return cls(
                texts["checkpoint"],
                int(texts["keep"]),
                parse_json(texts["samples"], "the list of samples"),
                tensors,
            )
        except (
            SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError, UserError,
        ) as error:  # fmt: skip
            raise UserError(f"{file} holds no calibration statistics that can be read ({error}).") from error


def observed_as(config: ModelConfig) -> dict[str, str]:
    """Layer → the layer under whose name its input is observed; layers that share an input share that."""
    shared = {name: folding.consumers[0] for folding in foldings(config) for name in folding.consumers}
    return {
        layer.name: shared.get(layer.name, layer.name)
        for component in TRACED_COMPONENTS
        for layer in component_layers(config, component)
    }


def known_statistics(
    source: Checkpoint, samples: Sequence[Sample], folder: Path, keep: int = ROWS
) -> Statistics:
    """What a folder holds already of these samples; nothing where there is no file.

    Raises:
        UserError: it is of another checkpoint or of other samples, or keeps another number of rows.
    """
    file = folder / STATISTICS_FILE
    statistics = Statistics.load(file) if file.exists() else Statistics(source.digest, keep)
    if (statistics.checkpoint, statistics.keep) != (source.digest, keep):
        raise UserError(
            f"{file} is of another checkpoint or keeps another number of rows; give another folder."
        )
    if not set(statistics.samples) <= {sample.digest for sample in samples}:
        raise UserError(f"{file} holds samples that are not among the data; give another folder.")
    return statistics


def collect(
    source: Checkpoint,
    embedding_file: Path,
    samples: Sequence[Sample],
    folder: Path,
    keep: int = ROWS,
    on_step: OnStep = lambda done, total: None,
) -> Statistics:
    """Run samples through the whole fp32 chain, the model's own answers teacher-forced, and observe.

    Goes on where an earlier call on the same folder stopped. What is observed of a sample does not depend
    on the others.

    Args:
        folder: where the statistics are kept.
        keep: rows kept of every activation.

    Raises:
        UserError: an activation is NaN or infinite (the layer is named), or the statistics in the folder
            are of another checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STATISTICS_FILE
    statistics = known_statistics(source, samples, folder, keep)
    digests, known = [sample.digest for sample in samples], set(statistics.samples)
    todo = [(s, d) for s, d in dict(zip(samples, digests, strict=True)).items() if d not in known]
    done = len(samples) - len(todo)
    on_step(done, len(samples))
    if not todo:
        return statistics
    model = source.model()
    observer = _Observer(model, source.config, statistics)
    chain = reference_chain(source, embedding_file, model)
    chain.max_cached_images = 0  # an image that two samples show is observed for both
    saved = monotonic()
    try:
        for start in range(0, len(todo), GROUP):
            group = todo[start : start + GROUP]
            for (_, digest), (embeds, answer) in zip(group, _answers(chain, observer, group), strict=True):
                with observer.watching(digest):
                    _teacher_force(chain, observer, embeds, answer)
                observer.commit(digest)
                done += 1
                on_step(done, len(samples))
            if monotonic() - saved > SAVE_EVERY:
                statistics.save(file)
                saved = monotonic()
    finally:
        statistics.save(file)
    return statistics


def ask(chain: Chain, sample: Sample) -> str:
    """The whole prompt of a sample; its images come first where the question has no places for them."""
    spec = chain.tokenizer.spec
    messages = place_images([Message("user", sample.question)], len(sample.images))
    return format_chat(messages, spec.system_prompt, spec.template)


def _answers(
    chain: Chain, observer: _Observer, group: Sequence[tuple[Sample, str]]
) -> list[tuple[np.ndarray, list[int]]]:
    """Prompts ``[S, D]`` and the model's greedy answers, decoded together; images are observed on the way."""
    prompts = []
    for sample, digest in group:
        with observer.watching(digest):
            prompts.append(chain.embed_prompt(ask(chain, sample), sample.images))
    tokens, _ = greedy_decode(chain, prompts, ANSWER_TOKENS)
    answers = []
    for row in tokens.tolist():
        ends = [place for place, token in enumerate(row) if token in chain.tokenizer.spec.eos_ids]
        answers.append(row[: ends[0]] if ends else row)
    return list(zip(prompts, answers, strict=True))


def _teacher_force(chain: Chain, observer: _Observer, embeds: np.ndarray, answer: list[int]) -> None:
    """One pass over prompt and answer; the cache it leaves is observed too."""
    text = chain.embed_tokens(answer)
    whole = np.concatenate([embeds, text])
    cache = chain.decoder.new_cache(1, len(whole))
    for start in range(0, len(whole), chain.prefill_chunk):
        chunk = whole[None, start : start + chain.prefill_chunk]
        first = max(len(embeds) - 1 - start, 0)  # of the rows that predict the answer
        rows = np.arange(min(first, chunk.shape[1] - 1), chunk.shape[1])
        chain.decoder.decode(chunk, rows, cache)
    for spec, array in zip(cache.specs, cache.arrays, strict=True):
        kind, _, layer = spec.name.partition("_cache_")
        values = array[0].transpose(1, 0, 2).reshape(len(whole), -1)  # [S, Hkv * Dh]
        observer.see(f"decoder.layers.{layer}.self_attn/{kind}", values, rows=False)


class _Observer:
    """Hooks on every layer whose input is observed; a sample counts once it is committed."""

    def __init__(self, model: nn.Module, config: ModelConfig, statistics: Statistics) -> None:
        self._statistics = statistics
        self._sample: str | None = None
        self._seen: dict[str, list[tuple[str, TensorStatistics]]] = {}
        wanted = set(observed_as(config).values())
        for name, module in model.named_modules():
            if name in wanted:
                module.register_forward_pre_hook(self._hook(name, layer_kind(module) == "linear"))

    def _hook(self, name: str, linear: bool) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._sample is not None:
                x = args[0] if linear else args[0].movedim(1, -1)
                self.see(name, x.reshape(-1, x.shape[-1]).numpy(), rows=linear)

        return see

    @contextmanager
    def watching(self, sample: str) -> Iterator[None]:
        self._sample = sample
        try:
            yield
        finally:
            self._sample = None

    def see(self, name: str, values: np.ndarray, rows: bool) -> None:
        """Note an activation ``[R, C]`` of the sample that is watched."""
        if not np.isfinite(values).all():
            raise UserError(f"The input of {name} holds NaN or infinity; are the checkpoint's weights sound?")
        assert self._sample is not None
        noted = self._seen.setdefault(self._sample, [])
        part = f"{self._sample} {sum(known == name for known, _ in noted)}"
        noted.append((name, TensorStatistics.of(values, part, self._statistics.keep if rows else 0)))

    def commit(self, sample: str) -> None:
        """Add what was seen of a sample to the statistics."""
        for name, seen in self._seen.pop(sample):
            self._statistics.add(name, seen)
        self._statistics.samples.append(sample)
