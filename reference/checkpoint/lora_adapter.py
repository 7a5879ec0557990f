"""One LoRA adapter in PEFT's layout: its settings, and what each of its tensors changes.

Names and settings are those of PEFT 0.21. Scaling: alpha / r (LoRA, arXiv 2106.09685), or
alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reference.checkpoint.folder_content import (
    ADAPTER_CONFIG,
    TEMPLATE_FILES,
    WEIGHT_FILES,
    join_names,
    subfolder_hint,
    trainer_shards_hint,
)
from reference.checkpoint.layouts import EMBEDDING, HEAD, Shape
from reference.checkpoint.lora_targets import Slice, Targets
from reference.checkpoint.tensor_files import ADAPTER_FILES, FLOAT_DTYPES, TensorFiles
from reference.model.config import ModelConfig
from reference.settings import Settings
from runtimes.bundle.files import read_json, sha256_of_file
from runtimes.errors import UserError
from runtimes.hub import HubId, download

# Initializations that leave the base model unchanged; others move a part of its weights into the
# adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings of adapters that do not only change weights, or change them in another way than LoRA and
# DoRA.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_LORA = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<kind>weight|bias))?$"
)
# Patterns of an adapter are untrusted: repeated groups can take exponential time.
MAX_PATTERN, MAX_REPEATS = 300, 3
_SLOW_PATTERN = re.compile(r"\)[*+{]")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.|\.base_layer\.")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that the user names: its folder and the factor of its change.

    Args:
        folder: holds ``adapter_config.json`` and the tensors; or a hub id.
        weight: multiplies the change to each weight; None is 1 and was not asked for.
    """

    folder: Path
    weight: float | None = None

    @classmethod
    def parse(cls, text: str, relative_to: Path = Path()) -> AdapterChoice:
        """Read ``FOLDER`` or ``FOLDER=WEIGHT``.

        Args:
            text: the choice, as on the command line.
            relative_to: folder of relative paths.

        Raises:
            UserError: the weight is not a finite number.
        """
        folder, separator, number = text.rpartition("=")
        if not separator or (relative_to / Path(text).expanduser()).exists():
            return cls(_locate(text, relative_to))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"The weight {number!r} of the adapter {folder} is not a number.")
        return cls(_locate(folder, relative_to), weight)

    def __str__(self) -> str:
        """Return the form that ``parse`` reads."""
        return str(self.folder) if self.weight is None else f"{self.folder}={self.weight!r}"


def parse_adapters(texts: Iterable[str]) -> tuple[AdapterChoice, ...]:
    """Read the adapters of a command or config; see ``AdapterChoice.parse``.

    Raises:
        UserError: one is malformed, or given twice.
    """
    choices = tuple(map(AdapterChoice.parse, texts))
    folders = [choice.folder.resolve() for choice in choices]
    for choice, folder in zip(choices, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(
                f"The adapter {choice.folder} is given twice, so its change would be added twice; give it"
                " once, with a weight if you want more of it."
            )
    return choices


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor of the checkpoint.

    Attributes:
        target: the tensor, as rows of a parameter.
        module: name of the module in the adapter.
        scaling: factor of the product of the two matrices.
        down: name of the adapter's tensor ``[r, inputs]``; None if the change is a bias.
        up: name of the adapter's tensor ``[outputs, r]``, or of the change of a bias.
        magnitude: name of DoRA's tensor ``[outputs]``.
        replacement: name of the adapter's tensor that replaces the target; the others are None.
        embedding: the target is a lookup table, whose matrices are transposed.
    """

    target: Slice
    module: str
    scaling: float = 1.0
    down: str | None = None
    up: str | None = None
    magnitude: str | None = None
    replacement: str | None = None
    embedding: bool = False


class Adapter:
    """One LoRA adapter, read for a model.

    Args:
        choice: where it is, and its weight.
        config: of the base model.
        shapes: parameter name → shape, as in ``DeepSeekVL.named_parameters()``.

    Raises:
        UserError: it is not a LoRA adapter, is damaged, or does not fit the model.
    """

    def __init__(self, choice: AdapterChoice, config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
        """Read the settings and the names and shapes of the tensors."""
        self.folder = _resolve(choice.folder)
        self.weight = choice.weight
        self.settings = _read_settings(self.folder)
        self._files = _tensor_files(self.folder)
        self._shapes = shapes
        self.changes = self._find_changes(Targets(config, shapes))
        self._check_shapes()

    @property
    def files(self) -> list[Path]:
        """The files that make it up, for its identity."""
        return [self.folder / ADAPTER_CONFIG, *self._files.files]

    def identity(self) -> list[str]:
        """Return the SHA-256 of each file with the adapter's weight."""
        return [f"{sha256_of_file(file)} {self.factor}" for file in self.files]

    @property
    def factor(self) -> float:
        """The weight of the adapter; 1 if none was asked for."""
        return 1.0 if self.weight is None else self.weight

    def load(self, name: str) -> Tensor:
        """A tensor of the adapter in fp32.

        Raises:
            UserError: it holds NaN or infinity.
        """
        tensor = self._files.load(name)
        if tensor.is_meta:
            raise UserError(f"The tensor {name} of the adapter {self.folder} has no values.")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(f"The tensor {name} of the adapter {self.folder} holds NaN or infinity.")
        return tensor

    def _find_changes(self, targets: Targets) -> list[Change]:
        modules: dict[str, dict[str, str]] = {}
        replacements: dict[str, str] = {}
        for name in self._files.stored:
            plain = re.sub(r"^base_model\.(model\.)?", "", name)
            if ".original_module." in plain or targets.unused(plain):
                continue
            if match := _LORA.match(plain):
                part = match["part"] + (".bias" if match["kind"] == "bias" else "")
                table, key = modules.setdefault(match["module"], {}), part
            else:
                table, key = replacements, _SAVED.sub(".", plain)
            if key in table:
                raise UserError(
                    f"The adapter {self.folder} has {table[key]} and {name}, which are the same tensor."
                )
            table[key] = name
        self._check_dtypes()
        unknown = [
            name
            for module, parts in modules.items()
            if f"{module}.weight" not in targets
            for name in parts.values()
        ] + [name for tensor, name in replacements.items() if tensor not in targets]
        if unknown:
            part = "none" if len(unknown) == len(self._files.stored) else "only a part"
            raise UserError(
                f"The adapter {self.folder} does not fit this model: {part} of its tensors belong to it;"
                f" {len(unknown)} do not: {join_names(sorted(unknown))}."
            )
        changes = [  # first, since an embedding may come whole and with LoRA's matrices
            Change(targets[tensor], tensor, replacement=name) for tensor, name in sorted(replacements.items())
        ]
        for module, parts in sorted(modules.items()):
            changes += self._lora_changes(module, parts, targets)
        if not changes:
            raise UserError(f"The adapter {self.folder} holds no tensors.")
        targets_of_lora = [change.target for change in changes if not change.replacement]
        if len(set(targets_of_lora)) < len(targets_of_lora):
            raise UserError(f"The adapter {self.folder} changes a layer under two names; save it again.")
        return changes

    def _check_dtypes(self) -> None:
        """Refuse tensors that are not floats: they are quantized or damaged."""
        odd = [name for name, stored in self._files.stored.items() if stored.dtype not in FLOAT_DTYPES]
        if odd:
            raise UserError(
                f"The adapter {self.folder} has tensors of other types than floats: {join_names(odd)}; save"
                " it in float32, float16 or bfloat16."
            )

    def _lora_changes(self, module: str, parts: Mapping[str, str], targets: Targets) -> list[Change]:
        embedding = "embedding_A" in parts
        known = {f"{'embedding_' * embedding}{part}" for part in "AB"} | {"magnitude_vector", "B.bias"}
        if unknown := [name for part, name in parts.items() if part not in known]:
            raise UserError(f"The adapter {self.folder} has unknown tensors: {join_names(unknown)}.")
        down, up = (parts.get("embedding_" * embedding + part) for part in "AB")
        if down is None or up is None:
            raise UserError(f"The adapter {self.folder} has only one of the two LoRA matrices of {module}.")
        rank = self._files.stored[down].shape[:1]
        wanted, scaling = self._scaling(module)
        if rank != (wanted,):
            raise UserError(
                f"The adapter {self.folder} has rank {rank[0] if rank else 0} in {module}, but"
                f" {ADAPTER_CONFIG} says {wanted}."
            )
        magnitude = parts.get("magnitude_vector")
        if (magnitude is not None) != self.settings.flag("use_dora", False):
            raise UserError(
                f"{ADAPTER_CONFIG} of {self.folder} says use_dora: {str(magnitude is None).lower()}, but"
                f" {module} has {'a' if magnitude else 'no'} magnitude vector."
            )
        if magnitude is not None and self.weight not in (None, 1.0):
            raise UserError(f"{self.folder} is a DoRA adapter, which has no weight; name it without one.")
        changes = [
            Change(target, module, scaling, down, up, magnitude, embedding=embedding)
            for target in targets.sharing(f"{module}.weight")
        ]
        if bias := parts.get("B.bias"):
            if f"{module}.bias" not in targets:
                raise UserError(f"The adapter {self.folder} has a bias for {module}, which has none.")
            changes.append(Change(targets[f"{module}.bias"], module, scaling, up=bias))
        return changes

    def rank(self, module: str) -> int:
        """Return the rank of a module's change."""
        return self._scaling(module)[0]

    def _scaling(self, module: str) -> tuple[int, float]:
        """Rank and factor of a module's change."""
        rank = self.settings.integer("r")
        alpha = self.settings.number("lora_alpha", 8.0)
        ranks, alphas = (
            self.settings.section(key, optional=True) for key in ("rank_pattern", "alpha_pattern")
        )
        if key := _pattern(ranks, module):
            rank = ranks.integer(key)
        if key := _pattern(alphas, module):
            alpha = alphas.number(key)
        root = self.settings.flag("use_rslora", False)
        return rank, alpha / (math.sqrt(rank) if root else rank)

    def _check_shapes(self) -> None:
        problems = {}
        for change in self.changes:
            for name, expected in self._expected_shapes(change).items():
                found = self._files.stored[name].shape
                if found != expected:
                    problems[name] = (change, f"{name} is {list(found)}, expected {list(expected)}")
        if problems:
            vocabulary = all(change.target.parameter in (EMBEDDING, HEAD) for change, _ in problems.values())
            cause, remedy = "was made for another model", ""
            if vocabulary:
                cause = "was trained with another vocabulary"
                remedy = (
                    "; resize the base model's vocabulary in transformers, save it with the adapter's"
                    " tokenizer, and export that with the adapter"
                )
            shapes = join_names(text for _, text in problems.values())
            raise UserError(
                f"The adapter {self.folder} {cause}: {len(problems)} tensors have other shapes:"
                f" {shapes}{remedy}."
            )

    def _expected_shapes(self, change: Change) -> dict[str, Shape]:
        """Shapes of the adapter's tensors by their names."""
        shape = change.target.shape
        if change.replacement:
            return {change.replacement: shape}
        assert change.up
        if change.down is None:
            return {change.up: shape}
        rank = self._scaling(change.module)[0]
        outputs, *inputs = shape
        convolution = len(shape) == 4
        if change.embedding:  # the table is [tokens, width]
            expected = {change.down: (rank, outputs), change.up: (*inputs, rank)}
        else:
            expected = {change.down: (rank, *inputs), change.up: (outputs, rank, *[1, 1] * convolution)}
        if change.magnitude:
            channels = inputs[0] if change.embedding else outputs
            expected[change.magnitude] = (1, channels, 1, 1) if convolution else (channels,)
        return expected


def base_model(folder: Path) -> str:
    """Return the base model that an adapter's settings name, or ``CHECKPOINT``."""
    try:
        name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except UserError:
        name = None
    return name if isinstance(name, str) and name.isprintable() and name else "CHECKPOINT"


def _pattern(patterns: Settings, module: str) -> str | None:
    """Return the first key that matches the end of a module's name, as PEFT does."""
    for key in patterns.values:
        repeats = len(re.findall(r"[*+{]", key))
        if len(key) > MAX_PATTERN or repeats > MAX_REPEATS or _SLOW_PATTERN.search(key):
            where = f"{patterns.file}: {patterns.path.rstrip('.')}"
            raise UserError(f"{where} has a pattern that is too complex; name the modules.")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{patterns.file}: {patterns.path}{key} is not a pattern: {error}.") from error
    return None


def _locate(text: str, relative_to: Path) -> Path:
    """Return the path of an adapter's folder, or a hub id as it is."""
    folder = relative_to / Path(text).expanduser()
    return folder if folder.exists() or HubId.parse(text) is None else Path(text)


def _resolve(folder: Path) -> Path:
    """Return the folder of an adapter; a hub id is downloaded first.

    Raises:
        UserError: there is no such folder, and it cannot be downloaded.
    """
    if folder.is_dir():
        return folder
    hub_id = HubId.parse(folder)
    if hub_id is None:
        raise UserError(f"There is no folder {folder}; give the folder of the adapter.")
    return download(hub_id, [ADAPTER_CONFIG, *ADAPTER_FILES, "adapter_model-*-of-*", *TEMPLATE_FILES]).folder


def _read_settings(folder: Path) -> Settings:
    """``adapter_config.json``, with what cannot be merged refused."""
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        hint = subfolder_hint(folder, adapters=True)
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter in PEFT's layout{hint}.")
    settings = Settings(read_json(file), str(file))
    kind = settings.text("peft_type", "LORA")
    if kind.upper() != "LORA":
        raise UserError(f"{folder} is an adapter of the type {kind}; only LoRA and DoRA can be merged.")
    for key in _UNSUPPORTED:
        if settings.values.get(key):
            raise settings.error(key, "which cannot be merged into the weights here")
    start = settings.values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise settings.error(
            "init_lora_weights",
            "so that the base model's weights were changed when the training began; save it in PEFT with"
            " path_initial_model_for_weight_conversion",
        )
    if settings.values.get("fan_in_fan_out"):
        raise settings.error("fan_in_fan_out", "but no layer of this model stores its weight transposed")
    settings.integer("r")
    settings.number("lora_alpha", 8.0)
    return settings


def _tensor_files(folder: Path) -> TensorFiles:
    """Open the weights; some trainers write those of the adapter under the names of a model's."""
    for name in (*ADAPTER_FILES, *WEIGHT_FILES):
        if (folder / name).exists():
            return TensorFiles(folder, folder / name)
    raise UserError(
        f"{folder} holds no weights of an adapter: expected one of {', '.join(ADAPTER_FILES)}"
        f"{trainer_shards_hint(folder)}."
    )
