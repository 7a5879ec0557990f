"""The quantization error of a precision: of the reference itself, by golden and stage, and by tap.

For fp16 and bf16 it is the rounding error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.metrics import top1_tie_error
from dsvl_export.parity_check.stage_tensors import STEPS, vision_tensors
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import parse_json, read_json
from runtimes.chain import Chain
from runtimes.errors import PrecisionOverflowError, UserError
from runtimes.goldens.golden import Golden, relative_rms
from runtimes.goldens.long_context import LongGolden, record_long_golden
from runtimes.goldens.taps import TAPPED_COMPONENTS, record_taps

TOP1, CHAIN = "choices", "chain_logits"  # keys of the file beside the stages
WORST_ROW = "prefill_logits"  # the stage whose error is that of the worst row of logits
TIE_MARGIN = 1.1  # factor: the logits of another kernel differ in the last digits
REMEDY = "export with another base precision"
Errors = dict[str, float]  # stage or tap → relative RMS error; only finite ones


@dataclass(frozen=True)
class QuantizationError:
    """Relative RMS errors of the reference when it computes in a precision.

    ``goldens`` has for each golden, in order, stage → error. ``prefill_logits``, which are a single
    row, have the error of the golden's worst row: the rounding of one row is one draw of many. Two
    keys are not stages: ``choices`` is the error from which on all top-1 tokens that the precision
    changes are near ties; ``chain_logits`` is the largest error of a row of logits where the errors
    of all components add up, from the image on. ``taps`` has component → tap → error on the first
    golden. Both are empty if nothing was measured, as for fp32.
    """

    goldens: tuple[Errors, ...] = ()
    taps: Mapping[str, Errors] = field(default_factory=dict)

    def at(self, golden: int, stage: str) -> float | None:
        """Return the error of a golden at a stage; None if it was not measured."""
        return self.goldens[golden].get(stage) if golden < len(self.goldens) else None

    def tie_error(self, golden: int, stage: str) -> float:
        """Return the error of the logits up to which a changed top-1 token is a near tie."""
        rows = max(self.at(golden, stage) or 0.0, self.at(golden, WORST_ROW) or 0.0)
        return max(rows, TIE_MARGIN * (self.at(golden, TOP1) or 0.0))

    def plus(self, other: QuantizationError) -> QuantizationError:
        """Return the sum of two errors, for two artifacts that are compared with each other."""
        nothing: Errors = {}
        return QuantizationError(
            tuple(_sum(a, b) for a, b in zip_longest(self.goldens, other.goldens, fillvalue=nothing)),
            {name: _sum(self.taps.get(name, {}), other.taps.get(name, {})) for name in TAPPED_COMPONENTS},
        )


def _sum(first: Errors, second: Errors) -> Errors:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}


def quantization_error_file(precision: str) -> str:
    """Return the path of the recorded errors in a bundle."""
    return f"quantization_error/{precision}/quantization_error.json"


def old_quantization_error_file(precision: str) -> str:
    """Return the path of the recorded errors in a bundle of dsvl-export 0.4."""
    return f"noise/{precision}/noise.json"


def read_quantization_error(bundle: Bundle, precision: str) -> QuantizationError:
    """Read the recorded errors of a bundle; empty if it has none.

    Raises:
        UserError: the file is damaged.
    """
    files = (quantization_error_file(precision), old_quantization_error_file(precision))
    path = next((file for file in files if file in bundle.manifest.files), None)
    if path is None:
        return QuantizationError()
    bundle.check([path])
    raw = read_json(bundle.path(path))
    try:
        taps = {str(name): _errors(row) for name, row in raw["taps"].items()}
        return QuantizationError(tuple(_errors(row) for row in raw["goldens"]), taps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{bundle.path(path)} is not a readable file of quantization errors; export the bundle again."
        ) from error


def _errors(row: Mapping[str, float]) -> Errors:
    """Check a row of errors; raises ValueError, TypeError or AttributeError if it is damaged."""
    errors = {str(name): float(value) for name, value in row.items()}
    if not all(0 <= value < math.inf for value in errors.values()):
        raise ValueError("errors must be numbers of at least 0")
    return errors


def measure_quantization_error(
    chain: Chain,
    checkpoint: str,
    precision: str,
    goldens: Goldens,
    on_step: Callable[[int, int], None],
    journal: Path | None = None,
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Run the stages with what a precision plan computes in PyTorch.

    Args:
        chain: of ``mixed_chain``, with taps.
        checkpoint: SHA-256 of the checkpoint.
        precision: name of the precision or of the mix, for the message.
        goldens: recorded outputs of the fp32 reference.
        on_step: called with the goldens done and all goldens.
        journal: a file with the results of an interrupted call, a line for each golden; this call
            resumes it and adds to it.
        remedy: what the user can do if the plan overflows, for the message.

    Returns:
        The errors as JSON values, for ``read_quantization_error``.

    Raises:
        PrecisionOverflowError: the plan computes NaN or infinity; the message names the layer and
            the golden.
    """
    rows = _read_journal(journal) if journal else []
    for index in range(len(rows), len(goldens.files)):
        on_step(index, len(goldens.files))
        golden = goldens.load(index, checkpoint)
        features: dict[str, np.ndarray] = {}
        row: Errors = {}
        for tensor in vision_tensors(chain, golden):
            component = tensor.stage
            if not np.isfinite(tensor.actual).all():
                raise _overflow(chain, golden, component, precision, remedy)
            if component == "vision_encoder":
                features[tensor.name] = tensor.actual
            _keep_largest(row, tensor.stage, relative_rms(tensor.actual, tensor.expected))
        # Logits after the reference's image embeddings, and after those of the precision.
        decoder_logits, chain_logits = _logits(chain, golden, (golden.image_embeds, chain.adapt(features)))
        if not (np.isfinite(decoder_logits).all() and np.isfinite(chain_logits).all()):
            raise _overflow(chain, golden, "decoder", precision, remedy)
        _keep_largest(row, WORST_ROW, max(map(relative_rms, decoder_logits, golden.logits)))
        # The parity check also judges single decode steps by themselves.
        for part in (slice(None), slice(1, STEPS + 1)):
            error = relative_rms(decoder_logits[part], golden.logits[part])
            _keep_largest(row, "teacher_forced_logits", error)
        row[TOP1] = max(top1_tie_error(logits, golden.logits) for logits in (decoder_logits, chain_logits))
        row[CHAIN] = max(map(relative_rms, chain_logits, golden.logits))
        taps: dict[str, Errors] = {}
        for component, expected in golden.taps.items():
            tapped = record_taps(chain, golden, component)
            errors = {name: relative_rms(tapped[name], array) for name, array in expected.items()}
            taps[component] = {name: error for name, error in errors.items() if math.isfinite(error)}
        rows.append((row, taps))
        if journal:
            with journal.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
    on_step(len(goldens.files), len(goldens.files))
    tap_errors = {component: errors for _, taps in rows for component, errors in taps.items()}
    return {"goldens": [row for row, _ in rows], "taps": tap_errors}


def measure_long_golden(chain: Chain, precision: str, golden: LongGolden, remedy: str = REMEDY) -> LongGolden:
    """Compute the long golden with a precision plan in PyTorch.

    Args:
        chain: of ``planned_chain``, without taps.
        precision: name of the precision, for the message.
        golden: of the fp32 reference.
        remedy: what the user can do if the plan overflows, for the message.

    Raises:
        PrecisionOverflowError: the plan computes NaN or infinity; the message names the layer.
    """
    planned = record_long_golden(chain, golden.tokens, golden.checkpoint, golden.capacity)
    if layer := planned.first_nonfinite_part():
        raise PrecisionOverflowError(f"{layer} overflows in {precision} on the long golden; {remedy}.")
    return planned


def _overflow(
    chain: Chain, golden: Golden, component: str, precision: str, remedy: str
) -> PrecisionOverflowError:
    """Return the error that names the first layer whose tap is not finite."""
    taps = record_taps(chain, golden, component)
    layer = next((f".{name}" for name, array in taps.items() if not np.isfinite(array).all()), "")
    images = ", ".join(golden.images)
    return PrecisionOverflowError(
        f"{component}{layer} overflows in {precision}: it gives NaN or infinity on the golden of {images};"
        f" {remedy}."
    )


def _read_journal(journal: Path) -> list[tuple[Errors, dict[str, Errors]]]:
    """Read the errors of goldens and taps, and cut off a line that was not written completely."""
    lines = journal.read_bytes().split(b"\n") if journal.exists() else []
    rows: list[tuple[Errors, dict[str, Errors]]] = []
    for line in lines:
        try:
            row, taps = parse_json(line, "a line of the journal")
            rows.append((_errors(row), {str(name): _errors(errors) for name, errors in taps.items()}))
        except (UserError, TypeError, ValueError, AttributeError):
            break
    journal.write_bytes(b"".join(line + b"\n" for line in lines[: len(rows)]))
    return rows


def _keep_largest(row: Errors, stage: str, error: float) -> None:
    """Store the error of a stage unless a larger one is stored."""
    if math.isfinite(error):
        row[stage] = max(error, row.get(stage, 0.0))


def _logits(chain: Chain, golden: Golden, image_embeds: Sequence[np.ndarray]) -> np.ndarray:
    """Compute logits ``[N, n, V]`` of the greedy tokens after each of ``N`` image embeddings.

    It is one call, since the weights are streamed and rounded once per call.
    """
    answer = chain.embed_tokens(golden.greedy_tokens[:-1])
    inputs = np.stack(
        [np.concatenate([chain.merge(golden.prompt_tokens, image), answer]) for image in image_embeds]
    )
    rows = np.arange(len(golden.prompt_tokens) - 1, inputs.shape[1])
    return chain.decoder.decode(inputs, rows, chain.decoder.new_cache(*inputs.shape[:2]))
