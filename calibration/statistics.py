"""Calibration statistics of a model: collected sample by sample, saved, resumed and merged."""

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
from calibration.folding import list_foldings
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

ANSWER_BATCH = 8  # samples whose answers are decoded in one batch
ANSWER_TOKENS = 32
KEPT_ROWS = 512  # rows kept of every activation
SAVE_SECONDS = 60.0  # between two saves
STATISTICS_FILE = "statistics.safetensors"
OnStep = Callable[[int, int], None]


@dataclass
class Statistics:
    """Statistics of the inputs of layers and of caches.

    ``tensors`` maps a layer, or ``{attention}/key`` and ``{attention}/value``, to statistics.
    """

    checkpoint: str  # SHA-256
    keep: int = KEPT_ROWS
    samples: list[str] = field(default_factory=list)  # digests
    tensors: dict[str, TensorStatistics] = field(default_factory=dict)

    @property
    def data_digest(self) -> str:
        """SHA-256 over the digests of all samples."""
        return hashlib.sha256("\n".join(sorted(self.samples)).encode()).hexdigest()

    def add(self, name: str, observed: TensorStatistics) -> None:
        """Merge statistics of a layer or cache into those there are."""
        previous = self.tensors.get(name)
        self.tensors[name] = previous.merged(observed, self.keep) if previous else observed

    def merge(self, other: Statistics) -> None:
        """Merge statistics of other samples.

        Raises:
            UserError: they belong to another checkpoint, keep another number of rows, or share
                samples.
        """
        if (self.checkpoint, self.keep) != (other.checkpoint, other.keep):
            raise UserError(
                "Statistics of another checkpoint or with another number of rows cannot be merged."
            )
        shared = set(self.samples) & set(other.samples)
        if shared:
            raise UserError(f"{len(shared)} samples are in both statistics; merge parts of one data set.")
        self.samples += other.samples
        for name, observed in other.tensors.items():
            self.add(name, observed)

    def save(self, file: Path) -> None:
        """Write a file atomically.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {
            f"{name}/{part}": array
            for name, observed in self.tensors.items()
            for part, array in observed.to_tensors().items()
        }
        texts = {"checkpoint": self.checkpoint, "keep": str(self.keep), "samples": json.dumps(self.samples)}
        try:
            save_tensors(tensors, file, texts)
        except (OSError, SafetensorError) as error:
            raise UserError(f"The statistics {file} cannot be written: {error}.") from error

    @classmethod
    def load(cls, file: Path) -> Statistics:
        """Read a file.

        Raises:
            UserError: the file is missing or damaged.
        """
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
            raise UserError(f"{file} is not a readable file of calibration statistics ({error}).") from error


def observed_layers(config: ModelConfig) -> dict[str, str]:
    """Map each layer to the layer whose input is observed for it; layers can share an input."""
    shared = {name: folding.consumers[0] for folding in list_foldings(config) for name in folding.consumers}
    return {
        layer.name: shared.get(layer.name, layer.name)
        for component in TRACED_COMPONENTS
        for layer in component_layers(config, component)
    }


def load_or_create_statistics(
    source: Checkpoint, samples: Sequence[Sample], folder: Path, keep: int = KEPT_ROWS
) -> Statistics:
    """Load the statistics of a folder; empty statistics if there are none.

    Args:
        source: the checkpoint.
        samples: all samples that the statistics may have.
        folder: may hold ``STATISTICS_FILE``.
        keep: rows kept of every activation.

    Raises:
        UserError: the file belongs to another checkpoint, has other samples, or keeps another
            number of rows.
    """
    file = folder / STATISTICS_FILE
    statistics = Statistics.load(file) if file.exists() else Statistics(source.digest, keep)
    if (statistics.checkpoint, statistics.keep) != (source.digest, keep):
        raise UserError(
            f"{file} belongs to another checkpoint or keeps another number of rows; choose another folder."
        )
    if not set(statistics.samples) <= {sample.digest for sample in samples}:
        raise UserError(f"{file} holds samples that are not among the data; choose another folder.")
    return statistics


def collect_statistics(
    source: Checkpoint,
    embedding_file: Path,
    samples: Sequence[Sample],
    folder: Path,
    keep: int = KEPT_ROWS,
    on_step: OnStep = lambda done, total: None,
) -> Statistics:
    """Run samples through the fp32 chain and collect statistics of all layers.

    The model answers each sample; prompt and answer are then run teacher-forced. The same call on
    the same folder resumes. The statistics of a sample do not depend on other samples.

    Args:
        source: the checkpoint.
        embedding_file: the table that ``write_token_embedding`` wrote.
        samples: the requests.
        folder: where ``STATISTICS_FILE`` is saved; made if it does not exist.
        keep: rows kept of every activation.
        on_step: called with the number of samples done and in total.

    Raises:
        UserError: an activation is NaN or infinite (the message names the layer), or the statistics
            in the folder belong to another checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STATISTICS_FILE
    statistics = load_or_create_statistics(source, samples, folder, keep)
    digests, collected = [sample.digest for sample in samples], set(statistics.samples)
    todo = [(s, d) for s, d in dict(zip(samples, digests, strict=True)).items() if d not in collected]
    done = len(samples) - len(todo)
    on_step(done, len(samples))
    if not todo:
        return statistics
    model = source.load_model()
    observer = _Observer(model, source.config, statistics)
    chain = reference_chain(source, embedding_file, model)
    chain.max_cached_images = 0  # an image that two samples show is observed for both
    saved = monotonic()
    try:
        for start in range(0, len(todo), ANSWER_BATCH):
            group = todo[start : start + ANSWER_BATCH]
            for (_, digest), (embeds, answer) in zip(
                group, _decode_answers(chain, observer, group), strict=True
            ):
                with observer.observing(digest):
                    _observe_answer(chain, observer, embeds, answer)
                observer.commit(digest)
                done += 1
                on_step(done, len(samples))
            if monotonic() - saved > SAVE_SECONDS:
                statistics.save(file)
                saved = monotonic()
    finally:
        statistics.save(file)
    return statistics


def format_sample_prompt(chain: Chain, sample: Sample) -> str:
    """Format the prompt of a sample; images come first if the question has no placeholders."""
    spec = chain.tokenizer.spec
    messages = place_images([Message("user", sample.question)], len(sample.images))
    return format_chat(messages, spec.system_prompt, spec.template)


def _decode_answers(
    chain: Chain, observer: _Observer, group: Sequence[tuple[Sample, str]]
) -> list[tuple[np.ndarray, list[int]]]:
    """Decode the greedy answers of a batch of samples; image inputs are observed.

    Returns:
        Embeddings ``[S, D]`` of the prompt and tokens of the answer, for each sample.
    """
    prompts = []
    for sample, digest in group:
        with observer.observing(digest):
            prompts.append(chain.embed_prompt(format_sample_prompt(chain, sample), sample.images))
    tokens, _ = greedy_decode(chain, prompts, ANSWER_TOKENS)
    answers = []
    for row in tokens.tolist():
        ends = [index for index, token in enumerate(row) if token in chain.tokenizer.spec.eos_ids]
        answers.append(row[: ends[0]] if ends else row)
    return list(zip(prompts, answers, strict=True))


def _observe_answer(chain: Chain, observer: _Observer, embeds: np.ndarray, answer: list[int]) -> None:
    """Run prompt and answer teacher-forced; observes all layers and the final cache."""
    sequence = np.concatenate([embeds, chain.embed_tokens(answer)])
    cache = chain.decoder.new_cache(1, len(sequence))
    for start in range(0, len(sequence), chain.prefill_chunk):
        chunk = sequence[None, start : start + chain.prefill_chunk]
        first = max(len(embeds) - 1 - start, 0)  # the first row that predicts the answer
        rows = np.arange(min(first, chunk.shape[1] - 1), chunk.shape[1])
        chain.decoder.decode(chunk, rows, cache)
    for spec, array in zip(cache.specs, cache.arrays, strict=True):
        kind, _, layer = spec.name.partition("_cache_")
        values = array[0].transpose(1, 0, 2).reshape(len(sequence), -1)  # [S, Hkv * Dh]
        observer.record(f"decoder.layers.{layer}.self_attn/{kind}", values, rows=False)


class _Observer:
    """Hooks on every observed layer; a sample is added to the statistics when it is committed."""

    def __init__(self, model: nn.Module, config: ModelConfig, statistics: Statistics) -> None:
        self._statistics = statistics
        self._sample: str | None = None
        self._observed: dict[str, list[tuple[str, TensorStatistics]]] = {}
        layers = set(observed_layers(config).values())
        for name, module in model.named_modules():
            if name in layers:
                module.register_forward_pre_hook(self._hook(name, layer_kind(module) == "linear"))

    def _hook(self, name: str, linear: bool) -> Callable[[nn.Module, Any], None]:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._sample is not None:
                x = args[0] if linear else args[0].movedim(1, -1)
                self.record(name, x.reshape(-1, x.shape[-1]).numpy(), rows=linear)

        return observe

    @contextmanager
    def observing(self, sample: str) -> Iterator[None]:
        """Record the inputs of layers for a sample inside a ``with`` block."""
        self._sample = sample
        try:
            yield
        finally:
            self._sample = None

    def record(self, name: str, values: np.ndarray, rows: bool) -> None:
        """Record an activation ``[R, C]`` of the current sample."""
        if not np.isfinite(values).all():
            raise UserError(
                f"The input of {name} holds NaN or infinity; check the weights of the checkpoint."
            )
        assert self._sample is not None
        recorded = self._observed.setdefault(self._sample, [])
        part = f"{self._sample} {sum(other == name for other, _ in recorded)}"
        keep = self._statistics.keep if rows else 0
        recorded.append((name, TensorStatistics.from_values(values, part, keep)))

    def commit(self, sample: str) -> None:
        """Add the recorded activations of a sample to the statistics."""
        for name, observed in self._observed.pop(sample):
            self._statistics.add(name, observed)
        self._statistics.samples.append(sample)
