"""Stages of the reference: tokenizer, token embedding, goldens, quantization errors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from calibration.planned_model import mixed_chain, planned_chain
from calibration.precision_plan import PrecisionPlan
from calibration.quantized_weights import QuantizedWeights
from dsvl_export.exporter import stage_code
from dsvl_export.exporter.job import ExportJob
from dsvl_export.exporter.manifest import TOKEN_EMBEDDING
from dsvl_export.exporter.stages import GOLDENS, TOKEN_EMBEDDING_STAGE, Stage, StageProgress
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.layers import INPUTS as LAYER_INPUTS
from dsvl_export.parity_check.layers import outputs_file, record_inputs, record_outputs
from dsvl_export.parity_check.long_context import planned_file
from dsvl_export.parity_check.quantization_error import (
    measure_long_golden,
    measure_quantization_error,
    old_quantization_error_file,
    quantization_error_file,
)
from reference.checkpoint.specs import reference_settings
from reference.goldens.layers import layer_golden_bytes
from reference.goldens.record import (
    goldens_bytes,
    long_golden_bytes,
    record_reference_goldens,
    record_reference_long_golden,
)
from reference.session import write_token_embedding
from reference.trace import component_contract
from runtimes.bundle.files import JOURNAL, sha256_of_file, write_json, write_text
from runtimes.cache import cache_bytes
from runtimes.goldens.golden import SETTINGS, relative_rms
from runtimes.goldens.long_context import LONG_GOLDEN, LongGolden
from runtimes.prefix import MIN_TOKENS, StoredPrefix, compute_states, prefix_file, prefix_tokens
from runtimes.text.tokenizer import Tokenizer

FP32 = "fp32"  # the reference's own precision
LONG_GOLDEN_FILE = f"{GOLDENS}/{LONG_GOLDEN}"


class ReferenceStages:
    """Makes the stages of one export that need no compiler."""

    def __init__(self, job: ExportJob) -> None:
        """Make stages for a job whose output folder is open."""
        self._job, self._folder = job, job.staging.folder
        self._embedding = self._folder / TOKEN_EMBEDDING

    # Copies of the checkpoint.

    def tokenizer(self) -> Stage:
        """Return the stage that copies the tokenizer."""
        return Stage("tokenizer", self._recording_inputs, self._copy_tokenizer)

    def token_embedding(self) -> Stage:
        """Return the stage that writes the token embedding."""
        size = self._job.source.embedding_bytes
        return Stage(
            TOKEN_EMBEDDING_STAGE,
            self._recording_inputs,
            self._write_token_embedding,
            bytes=lambda: size() or 0,
        )

    def _recording_inputs(self) -> dict[str, Any]:
        return self._job.inputs(stage_code.RECORDING)

    def _copy_tokenizer(self, folder: Path, progress: StageProgress) -> dict[str, Any]:
        for file in self._job.source.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
        return {"checkpoint": self._job.source.digest}

    def _write_token_embedding(self, folder: Path, progress: StageProgress) -> dict[str, Any]:
        write_token_embedding(self._job.source, folder / Path(TOKEN_EMBEDDING).name)
        return {}

    # Outputs of the fp32 reference.

    def goldens(self) -> Stage:
        """Return the stage that records the reference's outputs."""
        return Stage(GOLDENS, self._recording_inputs, self._record_goldens, bytes=self._goldens_bytes)

    def long_golden(self) -> Stage:
        """Return the stage that records a text that fills the KV cache, once per capacity."""
        return Stage("long golden", self._long_golden_inputs, self._record_long_golden, extends=GOLDENS)

    def _goldens_bytes(self) -> int:
        """Return the bytes of all goldens, the long one included."""
        config = self._job.source.config
        return goldens_bytes(config) + long_golden_bytes(config, self._job.options.capacity)

    def _record_goldens(self, folder: Path, progress: StageProgress) -> dict[str, Any]:
        for journal in folder.glob(f"*{JOURNAL}"):
            file = journal.with_name(journal.name.removesuffix(JOURNAL))
            if not file.exists() or sha256_of_file(file) != journal.read_text():
                file.unlink(missing_ok=True)
        source = self._job.source
        record_reference_goldens(source, self._embedding, folder, progress.step, _write_journal)
        table = {TOKEN_EMBEDDING: asdict(self._job.staging.files()[TOKEN_EMBEDDING])}
        write_json(folder / SETTINGS, reference_settings(source) | {"files": table})
        return {"reference": "torch fp32", "torch": torch.__version__}

    def _long_golden_inputs(self) -> dict[str, Any]:
        return {"long_golden": self._job.options.capacity}

    def _record_long_golden(self, folder: Path, progress: StageProgress) -> dict[str, Any]:
        golden = record_reference_long_golden(self._job.source, self._embedding, self._job.options.capacity)
        golden.save(folder / LONG_GOLDEN)
        return {}

    def prefix(self, precision: str) -> Stage:
        """Return the stage that records the KV prefix of the system prompt for a precision.

        It writes nothing if the cache holds codes: they need scales, which are in the program.
        """
        return Stage(
            _folder(prefix_file(precision)),
            partial(self._prefix_inputs, precision),
            partial(self._record_prefix, precision),
            bytes=self._prefix_bytes,
        )

    def _prefix_tokens(self) -> np.ndarray:
        """Return the tokens of the system prompt; none if they are too few."""
        tokenizer = Tokenizer(self._job.source.tokenizer_files[0], self._job.prompt)
        tokens = np.array(prefix_tokens(tokenizer), np.int64)
        return tokens if len(tokens) >= MIN_TOKENS else tokens[:0]

    def _prefix_bytes(self) -> int:
        decoder = component_contract(self._job.source.config, "decoder", FP32)
        return cache_bytes(decoder.states, 1, len(self._prefix_tokens()))

    def _prefix_inputs(self, precision: str) -> dict[str, Any]:
        return {**self._job.inputs(stage_code.PREFIX), **self._job.plan_inputs(precision)}

    def _record_prefix(self, precision: str, folder: Path, progress: StageProgress) -> dict[str, Any]:
        """Run the reference in fp32, with the factors that smoothing folded into its weights."""
        source, planned = self._job.source, self._job.weights(precision)
        exact, tokens = QuantizedWeights(source, PrecisionPlan(FP32), planned.table), self._prefix_tokens()
        if planned.plan.kv_cache != "float" or not len(tokens):
            return {}
        states = [
            compute_states(planned_chain(weights, self._embedding), tokens)
            for weights in ((exact, planned) if precision != FP32 else (exact,))
        ]
        # Where the plan overflows, the artifact fails in the other stages of the parity check.
        errors = np.nan_to_num(list(map(relative_rms, states[-1], states[0])), nan=0, posinf=0)
        prefix = StoredPrefix(source.digest, tokens, states[0], errors.astype(np.float32))
        prefix.save(folder / Path(prefix_file(precision)).name)
        return {}

    # What a precision costs the reference.

    def quantization_errors(
        self, name: str, precisions: Mapping[str, str], remedy: str, optional: bool = False
    ) -> list[Stage]:
        """Return the stages that measure the quantization error of a precision on the goldens.

        They raise PrecisionOverflowError if the precision computes NaN or infinity.

        Args:
            name: of the precision, or of a mix.
            precisions: precision of each component.
            remedy: what to export if a precision overflows.
            optional: the precision is of an earlier export. If it overflows, the bundle has no
                quantization error of it, and ``parity`` finds the NaN or infinity in its artifacts.
        """
        optional_for, decoder = name if optional else None, precisions["decoder"]
        errors = Stage(
            _folder(quantization_error_file(name)),
            partial(self._error_inputs, precisions),
            partial(self._measure_error, name, precisions, remedy),
            optional_for=optional_for,
        )
        long_golden = Stage(
            _folder(planned_file(decoder)),
            partial(self._long_error_inputs, decoder),
            partial(self._measure_long_golden, decoder, remedy),
            optional_for=optional_for,
        )
        if set(precisions.values()) == {FP32}:
            return []
        return [errors] if decoder == FP32 else [errors, long_golden]

    def _error_inputs(self, precisions: Mapping[str, str]) -> dict[str, Any]:
        hashes = {
            path: entry.sha256
            for path, entry in self._job.staging.files().items()
            if path.startswith(f"{GOLDENS}/") and path != LONG_GOLDEN_FILE  # which follows the capacity
        }
        inputs = {**self._job.inputs(stage_code.QUANTIZATION_ERROR), "goldens": hashes}
        if len(set(precisions.values())) == 1:
            return {**inputs, **self._job.plan_inputs(precisions["decoder"])}
        plans = {component: self._job.plan_inputs(item) for component, item in precisions.items()}
        return {**inputs, "precisions": dict(precisions), "plans": plans}

    def _long_error_inputs(self, precision: str) -> dict[str, Any]:
        golden = self._job.staging.files().get(LONG_GOLDEN_FILE)
        digest = golden.sha256 if golden else None
        inputs = self._job.inputs(stage_code.QUANTIZATION_ERROR)
        return {**inputs, **self._job.plan_inputs(precision), "golden": digest}

    def _measure_error(
        self,
        name: str,
        precisions: Mapping[str, str],
        remedy: str,
        folder: Path,
        progress: StageProgress,
    ) -> dict[str, Any]:
        self._job.staging.forget(_folder(old_quantization_error_file(name)))
        weights = {component: self._job.weights(item) for component, item in precisions.items()}
        error = measure_quantization_error(
            mixed_chain(weights, self._embedding, tapped=True),
            self._job.source.digest,
            name,
            Goldens.recorded_into(self._folder / GOLDENS),
            progress.step,
            folder / f"quantization_error{JOURNAL}",
            remedy,
        )
        write_json(folder / Path(quantization_error_file(name)).name, error)
        return {}

    def _measure_long_golden(
        self, precision: str, remedy: str, folder: Path, progress: StageProgress
    ) -> dict[str, Any]:
        exact = LongGolden.load(self._folder / LONG_GOLDEN_FILE)
        chain = planned_chain(self._job.weights(precision), self._embedding)
        planned = measure_long_golden(chain, precision, exact, remedy)
        planned.save(folder / LONG_GOLDEN)
        return {}

    # Goldens of single layers.

    def layers(self, precisions: list[str]) -> list[Stage]:
        """Return the stages that record inputs of layers, and each precision's outputs."""
        input_bytes, output_bytes = layer_golden_bytes(self._job.source.config)
        inputs = Stage(
            _folder(LAYER_INPUTS),
            self._layer_inputs,
            self._record_layer_inputs,
            bytes=lambda: input_bytes,
        )
        outputs = [
            Stage(
                _folder(outputs_file(precision)),
                partial(self._layer_output_inputs, precision),
                partial(self._record_layer_outputs, precision),
                bytes=lambda: output_bytes,
            )
            for precision in precisions
            if precision != FP32
        ]
        return [inputs, *outputs]

    def _first_golden(self) -> str | None:
        """Return the path of the golden whose inputs the layers get."""
        files = sorted(path for path in self._job.staging.files() if path.startswith(f"{GOLDENS}/"))
        return next((path for path in files if path.endswith(".safetensors")), None)

    def _layer_inputs(self) -> dict[str, Any]:
        golden = self._first_golden()
        digest = self._job.staging.files()[golden].sha256 if golden else None
        return {**self._job.inputs(stage_code.LAYERS), "golden": digest}

    def _layer_output_inputs(self, precision: str) -> dict[str, Any]:
        return {**self._layer_inputs(), **self._job.plan_inputs(precision)}

    def _record_layer_inputs(self, folder: Path, progress: StageProgress) -> dict[str, Any]:
        golden = self._folder / str(self._first_golden())
        record_inputs(self._job.source, self._embedding, golden, folder / Path(LAYER_INPUTS).name)
        return {}

    def _record_layer_outputs(self, precision: str, folder: Path, progress: StageProgress) -> dict[str, Any]:
        file = folder / Path(outputs_file(precision)).name
        record_outputs(self._job.weights(precision), self._folder / LAYER_INPUTS, file)
        return {}


def _folder(file: str) -> str:
    """Return the stage that a file of the bundle belongs to."""
    return str(PurePosixPath(file).parent)


def _write_journal(file: Path) -> None:
    """Note the hash of a golden, so that an interrupted export keeps it."""
    write_text(file.with_name(file.name + JOURNAL), sha256_of_file(file))
