"""What a precision costs a checkpoint's own reference: per golden and rung, and per tap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsvl_export.parity_check.metrics import changed_choices
from dsvl_export.parity_check.stages import STEPS, Goldens, vision_stages
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import parse_json, read_json
from runtimes.chain import Chain
from runtimes.errors import PrecisionOverflowError, UserError
from runtimes.goldens.golden import Golden, relative_rms
from runtimes.goldens.long_context import LongGolden, record_long_golden
from runtimes.goldens.taps import TAPPED_COMPONENTS, record_taps

if TYPE_CHECKING:
    from calibration.quantized_weights import QuantizedWeights

CHOICES, CHAIN = "choices", "chain_logits"
WORST_ROW = "prefill_logits"  # the rung whose noise is that of the worst row of logits
TIE_ROOM = 1.1  # another kernel's logits differ in the last digits
REMEDY = "export with another base precision"
Errors = dict[str, float]  # relative RMS errors; what is not finite is left out


@dataclass(frozen=True)
class Noise:
    """Relative RMS errors that the precision's rounding alone causes.

    ``goldens``: rung → error for each golden in order (of prefill logits, a single row, that of the golden's
    worst row: one row's rounding is one draw of many), and as ``choices`` the noise that makes ties of all
    first choices which the precision changes, and as ``chain_logits`` the largest error of a row of logits
    where errors of all components add up, from the image on; ``taps``: component → tap → error, on the first.
    Empty where nothing was measured (fp32 has no such noise).
    """

    goldens: tuple[Errors, ...] = ()
    taps: Mapping[str, Errors] = field(default_factory=dict)

    def of(self, golden: int, rung: str) -> float | None:
        return self.goldens[golden].get(rung) if golden < len(self.goldens) else None

    def ties(self, golden: int, rung: str) -> float:
        """Noise below which a changed first choice is the precision's own doing."""
        rows = max(self.of(golden, rung) or 0.0, self.of(golden, WORST_ROW) or 0.0)
        return max(rows, TIE_ROOM * (self.of(golden, CHOICES) or 0.0))

    def plus(self, other: Noise) -> Noise:
        """Of two artifacts compared with each other."""
        nothing: Errors = {}
        return Noise(
            tuple(_sum(a, b) for a, b in zip_longest(self.goldens, other.goldens, fillvalue=nothing)),
            {name: _sum(self.taps.get(name, {}), other.taps.get(name, {})) for name in TAPPED_COMPONENTS},
        )


def _sum(one: Errors, other: Errors) -> Errors:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def noise_file(precision: str) -> str:
    return f"noise/{precision}/noise.json"


def read_noise(bundle: Bundle, precision: str) -> Noise:
    """The recorded noise of a bundle; empty where it has none."""
    path = noise_file(precision)
    if path not in bundle.manifest.files:
        return Noise()
    bundle.check([path])
    raw = read_json(bundle.path(path))
    try:
        taps = {str(name): _errors(row) for name, row in raw["taps"].items()}
        return Noise(tuple(_errors(row) for row in raw["goldens"]), taps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{bundle.path(path)} holds no noise that can be read; export the bundle again."
        ) from error


def _errors(row: Mapping[str, float]) -> Errors:
    found = {str(name): float(value) for name, value in row.items()}
    if not all(0 <= value < math.inf for value in found.values()):
        raise ValueError("errors must be numbers of at least 0")
    return found


def measure_noise(
    weights: QuantizedWeights,
    embedding_file: Path,
    goldens: Goldens,
    on_step: Callable[[int, int], None],
    journal: Path | None = None,
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Climb with what a precision plan computes in PyTorch; JSON-able, read again by ``read_noise``.

    Args:
        journal: what an interrupted call has found, a line for each golden; this call goes on with it.
        remedy: what to do where the plan's numbers overflow.

    Raises:
        PrecisionOverflowError: the plan computes NaN or infinity; the layer and the golden are named.
    """
    from calibration.planned_model import planned_chain  # deferred: imports torch

    chain = planned_chain(weights, embedding_file, tapped=True)
    found = _recorded(journal) if journal else []
    for index in range(len(found), len(goldens.files)):
        on_step(index, len(goldens.files))
        golden = goldens.load(index, weights.source.digest)
        features: dict[str, np.ndarray] = {}
        row: Errors = {}
        for stage in vision_stages(chain, golden):
            component = stage.rung
            if not np.isfinite(stage.found).all():
                raise _overflow(chain, golden, component, weights.plan.name, remedy)
            if component == "vision_encoder":
                features[stage.tensor] = stage.found
            _note(row, stage.rung, relative_rms(stage.found, stage.expected))
        given, own = _logits(chain, golden, (golden.image_embeds, chain.adapt(features)))
        if not (np.isfinite(given).all() and np.isfinite(own).all()):
            raise _overflow(chain, golden, "decoder", weights.plan.name, remedy)
        _note(row, WORST_ROW, max(map(relative_rms, given, golden.logits)))
        # The ladder judges single steps by themselves too.
        for part in (slice(None), slice(1, STEPS + 1)):
            _note(row, "teacher_forced_logits", relative_rms(given[part], golden.logits[part]))
        row[CHOICES] = max(changed_choices(logits, golden.logits) for logits in (given, own))
        row[CHAIN] = max(map(relative_rms, own, golden.logits))
        taps: dict[str, Errors] = {}
        for component, expected in golden.taps.items():
            tapped = record_taps(chain, golden, component)
            errors = {name: relative_rms(tapped[name], array) for name, array in expected.items()}
            taps[component] = {name: error for name, error in errors.items() if math.isfinite(error)}
        found.append((row, taps))
        if journal:
            with journal.open("a") as lines:
                lines.write(json.dumps(found[-1]) + "\n")
    on_step(len(goldens.files), len(goldens.files))
    of_layers = {component: errors for _, taps in found for component, errors in taps.items()}
    return {"goldens": [row for row, _ in found], "taps": of_layers}


def measure_long_golden(
    weights: QuantizedWeights, embedding_file: Path, golden: LongGolden, remedy: str = REMEDY
) -> LongGolden:
    """What a precision plan computes in PyTorch for the long golden.

    Raises:
        PrecisionOverflowError: it is NaN or infinity; the layer is named.
    """
    from calibration.planned_model import planned_chain  # deferred: imports torch

    chain = planned_chain(weights, embedding_file)
    found = record_long_golden(chain, golden.tokens, golden.checkpoint, golden.capacity)
    if layer := found.first_nonfinite_part():
        raise PrecisionOverflowError(
            f"{layer} overflows in {weights.plan.name} on the long golden; {remedy}."
        )
    return found


def _overflow(
    chain: Chain, golden: Golden, component: str, precision: str, remedy: str
) -> PrecisionOverflowError:
    """The verdict that names the first layer whose tap is not finite."""
    taps = record_taps(chain, golden, component)
    layer = next((f".{name}" for name, array in taps.items() if not np.isfinite(array).all()), "")
    images = ", ".join(golden.images)
    return PrecisionOverflowError(
        f"{component}{layer} overflows in {precision}: it gives NaN or infinity on the golden of {images};"
        f" {remedy}."
    )


def _recorded(journal: Path) -> list[tuple[Errors, dict[str, Errors]]]:
    """Errors of goldens and of their taps; half a line ends them, and is cut off."""
    lines = journal.read_bytes().split(b"\n") if journal.exists() else []
    found: list[tuple[Errors, dict[str, Errors]]] = []
    for line in lines:
        try:
            row, taps = parse_json(line, "a line of the journal")
            found.append((_errors(row), {str(name): _errors(errors) for name, errors in taps.items()}))
        except (UserError, TypeError, ValueError, AttributeError):
            break
    journal.write_bytes(b"".join(line + b"\n" for line in lines[: len(found)]))
    return found


def _note(row: Errors, rung: str, error: float) -> None:
    """Keep the larger error of a rung."""
    if math.isfinite(error):
        row[rung] = max(error, row.get(rung, 0.0))


def _logits(chain: Chain, golden: Golden, image_embeds: Sequence[np.ndarray]) -> np.ndarray:
    """Logits ``[N, n, V]`` that predict the golden's greedy tokens after each of ``N`` image embeddings.

    One call, as the weights are streamed and rounded once for all that it computes.
    """
    answer = chain.embed_tokens(golden.greedy_tokens[:-1])
    inputs = np.stack(
        [np.concatenate([chain.merge(golden.prompt_tokens, one), answer]) for one in image_embeds]
    )
    rows = np.arange(len(golden.prompt_tokens) - 1, inputs.shape[1])
    return chain.decoder.decode(inputs, rows, chain.decoder.new_cache(*inputs.shape[:2]))
