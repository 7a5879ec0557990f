"""LoRA adapters in PEFT's layout, merged into a checkpoint's parameters while these are read.

Formulas: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732 (scaling by the root of the rank); DoRA, arXiv
2402.09353 (a magnitude per output channel). Names and settings are those of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from reference.checkpoint.layouts import UNUSED, Shape, canonical_names, sources
from reference.checkpoint.settings import Settings
from reference.checkpoint.tensor_files import ADAPTER_CONFIG, ADAPTER_FILES, TensorFiles, list_names
from reference.model.config import Layout, ModelConfig
from runtimes.bundle.files import read_json, sha256_of_file
from runtimes.errors import UserError

EMBEDDING, HEAD = "token_embedding.weight", "decoder.head.weight"
LAYOUTS: tuple[Layout, ...] = ("original", "transformers")
# Ways to start the training that leave the base model as it is; the others move a part of its weights
# into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings under which an adapter is more than a change to weights, or another change than LoRA's and DoRA's.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_LORA = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<kind>weight|bias))?$"
)
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.|\.base_layer\.")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that the user names: its folder and the factor of its change.

    Args:
        folder: holds ``adapter_config.json`` and the tensors.
        weight: multiplies the change to each weight; None is 1 and was not asked for.
    """

    folder: Path
    weight: float | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterChoice:
        """Read ``FOLDER`` or ``FOLDER=WEIGHT``, as the command line takes it.

        Raises:
            UserError: the weight is not a finite number.
        """
        folder, separator, number = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(Path(text).expanduser())
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"The weight {number!r} of the adapter {folder} is not a number.")
        return cls(Path(folder).expanduser(), weight)


@dataclass(frozen=True)
class Slice:
    """Rows of a parameter that are one tensor of a checkpoint: a third of a joint q, k and v, or all rows."""

    parameter: str
    index: int
    count: int

    def rows(self, size: int) -> slice:
        """Of a parameter with so many rows."""
        part = size // self.count
        return slice(self.index * part, (self.index + 1) * part)


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor of the checkpoint.

    ``replacement`` takes the tensor's place. Otherwise ``down`` [r, inputs] and ``up`` [outputs, r] are
    multiplied and scaled (of convolutions, the inputs of all taps); ``magnitude`` [outputs] is DoRA's.
    Names are those of the adapter's tensors.
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
        self.folder = choice.folder
        self.weight = choice.weight
        self.settings = _read_settings(choice.folder)
        self._files = _tensor_files(choice.folder)
        self._shapes = shapes
        self.changes = self._find_changes(_Targets(config, shapes))
        self._check_shapes()

    @property
    def files(self) -> list[Path]:
        """The files that make it up, for its identity."""
        return [self.folder / ADAPTER_CONFIG, *self._files.files]

    def load(self, name: str) -> Tensor:
        """A tensor of the adapter in fp32.

        Raises:
            UserError: it holds NaN or infinity.
        """
        tensor = self._files.load(name).float()
        if not tensor.isfinite().all():
            raise UserError(f"The tensor {name} of the adapter {self.folder} holds NaN or infinity.")
        return tensor

    def _find_changes(self, targets: _Targets) -> list[Change]:
        modules: dict[str, dict[str, str]] = {}
        replacements: dict[str, str] = {}
        for name in self._files.stored:
            plain = re.sub(r"^base_model\.(model\.)?", "", name)
            if ".original_module." in plain or targets.unused(plain):
                continue
            if match := _LORA.match(plain):
                part = match["part"] + (".bias" if match["kind"] == "bias" else "")
                modules.setdefault(match["module"], {})[part] = name
            else:
                replacements[_SAVED.sub(".", plain)] = name
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
                f" {len(unknown)} do not: {list_names(sorted(unknown))}."
            )
        changes = [  # first, since an embedding may come whole and with LoRA's matrices
            Change(targets[tensor], tensor, replacement=name) for tensor, name in sorted(replacements.items())
        ]
        for module, parts in sorted(modules.items()):
            changes += self._lora_changes(module, parts, targets)
        if not changes:
            raise UserError(f"The adapter {self.folder} holds no tensors.")
        return changes

    def _lora_changes(self, module: str, parts: Mapping[str, str], targets: _Targets) -> list[Change]:
        embedding = "embedding_A" in parts
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
        problems = []
        for change in self.changes:
            whole = self._shapes[change.target.parameter]
            shape = (whole[0] // change.target.count, *whole[1:])
            for name, expected in self._expected_shapes(change, shape).items():
                found = self._files.stored[name].shape
                if math.prod(found) != math.prod(expected) or found[:1] != expected[:1]:
                    problems.append(f"{name} is {list(found)}, expected {list(expected)}")
        if problems:
            raise UserError(
                f"The adapter {self.folder} was made for another model: {len(problems)} tensors have other"
                f" shapes: {list_names(problems)}."
            )

    def _expected_shapes(self, change: Change, shape: Shape) -> dict[str, Shape]:
        if change.replacement:
            return {change.replacement: shape}
        assert change.up
        if change.down is None:
            return {change.up: shape}
        rank = self._scaling(change.module)[0]
        outputs, inputs = shape[0], shape[1:]
        if change.embedding:  # its lookup table is [tokens, width]
            down: Shape = (rank, outputs)
            up: Shape = (*inputs, rank)
        else:
            down, up = (rank, *inputs), (outputs, rank)
        expected = {change.down: down, change.up: up}
        if change.magnitude:
            size = math.prod(self._files.stored[change.magnitude].shape)
            channels = inputs[0] if change.embedding else outputs
            # Convolutions keep it as [1, outputs, 1, 1].
            if size == channels:
                channels = self._files.stored[change.magnitude].shape[0]
            expected[change.magnitude] = (channels, *self._files.stored[change.magnitude].shape[1:])
        return expected


@dataclass(frozen=True)
class Adapters:
    """The adapters that are merged into a checkpoint, in the order in which they were named."""

    adapters: tuple[Adapter, ...]
    _changes: dict[str, list[tuple[Adapter, Change]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        changes: dict[str, list[tuple[Adapter, Change]]] = {}
        for adapter in self.adapters:
            for change in adapter.changes:
                changes.setdefault(change.target.parameter, []).append((adapter, change))
        object.__setattr__(self, "_changes", changes)
        self._check_together()

    @classmethod
    def open(
        cls, choices: Sequence[AdapterChoice], config: ModelConfig, shapes: Mapping[str, Shape]
    ) -> Adapters:
        """Read adapters for a model.

        Raises:
            UserError: one cannot be read or does not fit, or two cannot be merged together.
        """
        return cls(tuple(Adapter(choice, config, shapes) for choice in choices))

    @property
    def files(self) -> list[Path]:
        """The files of all of them."""
        return [file for adapter in self.adapters for file in adapter.files]

    def identity(self) -> list[str]:
        """What tells these adapters from others: SHA-256 of their files, and their weights."""
        return [
            f"{sha256_of_file(file)} {1.0 if adapter.weight is None else adapter.weight}"
            for adapter in self.adapters
            for file in adapter.files
        ]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._changes

    def merge(self, parameter: str, tensor: Tensor) -> Tensor:
        """The parameter with all changes.

        Args:
            parameter: its name, as in ``DeepSeekVL.named_parameters()``.
            tensor: its value in the checkpoint, of any floating-point type.

        Returns:
            fp32 where an adapter changes it: a small change to a large weight is lost in half precision.

        Raises:
            UserError: an adapter's tensor holds NaN or infinity.
        """
        if parameter not in self._changes:
            return tensor
        base, merged = (tensor.to(torch.float32, copy=True) for _ in range(2))
        for adapter, change in self._changes[parameter]:
            rows = change.target.rows(len(base))
            if change.replacement:
                base[rows] = merged[rows] = adapter.load(change.replacement).reshape(base[rows].shape)
            else:
                merged[rows] = _apply(adapter, change, base[rows], merged[rows])
        return merged

    def _check_together(self) -> None:
        """Refuse what has no defined result.

        Raises:
            UserError: two adapters replace the same tensor, or scale one layer differently without weights.
        """
        for changes in self._changes.values():
            for position, (first, one) in enumerate(changes):
                for second, other in changes[position + 1 :]:
                    if first is second or one.target != other.target:
                        continue
                    if one.replacement or other.replacement:
                        raise UserError(
                            f"The adapters {first.folder} and {second.folder} both change {one.module}, and"
                            " one replaces it; merge one adapter at a time."
                        )
                    if one.scaling != other.scaling and None in (first.weight, second.weight):
                        raise UserError(
                            f"The adapters {first.folder} and {second.folder} scale {one.module} differently"
                            f" ({one.scaling:g} and {other.scaling:g}); give each a weight, as in"
                            f" --adapter {first.folder}=1 --adapter {second.folder}=1."
                        )


def _apply(adapter: Adapter, change: Change, base: Tensor, merged: Tensor) -> Tensor:
    """The rows of one tensor with one change more.

    Args:
        base: the checkpoint's values, whose norm DoRA takes.
        merged: the same with the changes so far.
    """
    factor = change.scaling * (1.0 if adapter.weight is None else adapter.weight)
    assert change.up
    up = adapter.load(change.up)
    if change.down is None:  # a bias
        return merged + factor * up
    delta = up.flatten(1) @ adapter.load(change.down).flatten(1)  # [outputs, inputs]
    delta = factor * (delta.T if change.embedding else delta).reshape(base.shape)
    if change.magnitude is None:
        return merged + delta
    magnitude = adapter.load(change.magnitude).flatten()
    if change.embedding:  # one per column of the table
        return (merged + delta) * (magnitude / (base + delta).norm(dim=0))
    norm = (base + delta).flatten(1).norm(dim=1)
    return (merged + delta) * (magnitude / norm).reshape(-1, *[1] * (base.dim() - 1))


class _Targets:
    """Tensor name → the parameters that it is a part of.

    Names are those of either checkpoint layout, whichever the base has: people train on one and deploy the
    other. Wrapping prefixes are accepted as in checkpoints.
    """

    def __init__(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
        self._tied = {EMBEDDING, HEAD} if config.tied_head else set()
        self._tables: list[tuple[ModelConfig, dict[str, Slice]]] = []
        for layout in sorted(LAYOUTS, key=lambda layout: layout != config.layout):
            table: dict[str, Slice] = {}
            layout_config = replace(config, layout=layout)
            for parameter, source in sources(layout_config, dict(shapes)).items():
                for index, name in enumerate(source.names):
                    table[name] = Slice(parameter, index, len(source.names))
            self._tables.append((layout_config, table))

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> Slice:
        target = self._find(name)
        if target is None:
            raise KeyError(name)
        return target

    def sharing(self, name: str) -> list[Slice]:
        """The parameters that change when this tensor is changed in place; two where the head is tied."""
        target = self[name]
        return (
            [Slice(each, 0, 1) for each in sorted(self._tied)] if target.parameter in self._tied else [target]
        )

    def unused(self, name: str) -> bool:
        """Whether a tensor belongs to what no model here uses, such as SigLIP's pooling head."""
        names = (canonical_names(config, [name]) for config, _ in self._tables)
        return any(UNUSED.fullmatch(canonical) for (canonical,) in names)

    def _find(self, name: str) -> Slice | None:
        for config, table in self._tables:
            (canonical,) = canonical_names(config, [name])
            if canonical in table:
                return table[canonical]
        return None


def _pattern(patterns: Settings, module: str) -> str | None:
    """The first key that matches the end of a module's name, as PEFT's ``get_pattern_key`` finds it."""
    for key in patterns.values:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error as error:
            raise UserError(f"{patterns.file}: {patterns.path}{key} is not a pattern: {error}.") from error
    return None


def _read_settings(folder: Path) -> Settings:
    """``adapter_config.json``, with what cannot be merged refused."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder of the adapter.")
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter in PEFT's layout.")
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
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return TensorFiles(folder, folder / name)
    raise UserError(f"{folder} holds no weights of an adapter: expected one of {', '.join(ADAPTER_FILES)}.")
