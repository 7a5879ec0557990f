"""The config of an export, and its YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from calibration.precision_plan import load_precision
from dsvl_export.compilers.registry import compiler_names, load_compiler
from dsvl_export.exporter.adapters import parse_named
from dsvl_export.targets.options import (
    DELEGATES,
    CompileOptions,
    ExecuTorchOptions,
    OnnxRuntimeOptions,
    TensorRTOptions,
)
from dsvl_export.targets.targets import find_target
from reference.checkpoint.chat_template import CHAT_TEMPLATES
from reference.checkpoint.lora_adapter import AdapterChoice
from runtimes.bundle.mixes import COMPONENTS
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError

DEFAULT_BACKEND = "onnxruntime"
AUTO = "auto"  # as a backend: the fastest for each component
PLAN_SUFFIXES = (".yaml", ".yml")
TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number"}
Config = TypeVar("Config")


@dataclass(frozen=True)
class ComponentChoices:
    """Backend and precision of components, each ``BACKEND:PRECISION``; None is not chosen."""

    vision_encoder: str | None = None
    adaptor: str | None = None
    decoder: str | None = None

    @classmethod
    def from_dict(cls, raw: Any) -> ComponentChoices:
        """Build the choices from component → ``BACKEND:PRECISION``.

        Raises:
            UserError: it is something else.
        """
        if not isinstance(raw, Mapping) or not all(isinstance(text, str) for text in raw.values()):
            raise UserError(
                "The components of a mix must map a component to 'BACKEND:PRECISION', such as {'decoder':"
                f" 'onnxruntime:fp32'}}; got {raw!r}."
            )
        for name in raw:
            if name not in COMPONENTS:
                raise UserError(
                    f"There is no component {name!r}; the components are {', '.join(COMPONENTS)}."
                )
        return cls(**raw)

    def chosen(self) -> dict[str, str]:
        """Return the chosen ones by component."""
        return {name: text for name in COMPONENTS if (text := getattr(self, name)) is not None}

    def filled(self, others: str | None) -> ComponentChoices:
        """Return the choices for all components of a mix.

        Args:
            others: for those that are not chosen. None is that of the vision encoder for the
                adaptor, and none for the other two.

        Raises:
            UserError: a component is missing, or has a backend or precision that does not exist.
        """
        chosen = self.chosen()
        for component, text in chosen.items():
            _check_choice(component, text)
        if others:
            chosen = dict.fromkeys(COMPONENTS, others) | chosen
        if "vision_encoder" in chosen:
            chosen.setdefault("adaptor", chosen["vision_encoder"])
        if missing := next((name for name in COMPONENTS if name not in chosen), None):
            raise UserError(
                f"The mix has no {missing}; add --component {missing}=BACKEND:PRECISION, or --backend and"
                " --precision for all components that are not named."
            )
        return ComponentChoices(**chosen)


def parse_choice(component: str, text: str) -> tuple[str, str]:
    """Return the backend and the precision of ``BACKEND:PRECISION``.

    Raises:
        UserError: it is something else.
    """
    backend, _, precision = text.partition(":")
    if not (backend and precision):
        raise UserError(f"The {component} {text!r} is not BACKEND:PRECISION, such as onnxruntime:fp32.")
    return backend, precision


@dataclass(frozen=True)
class ExportConfig:
    """Everything that decides what an export writes.

    In the YAML file, ``components``, ``onnxruntime``, ``tensorrt`` and ``executorch`` are mappings,
    and all keys but ``checkpoint`` may be left out. Relative paths are relative to the file's
    folder.

    Args:
        checkpoint: ``tiny``, a checkpoint folder, or a hub id.
        backend: name of the backend; None selects the target's first, or ``onnxruntime``. ``auto``
            selects the fastest backend and precision for each component; see ``export_fastest``.
        precisions: names, recipes, or YAML files of precision plans; each becomes a set of
            artifacts. Empty selects fp32, or the first that the backend and the target support.
        components: components of a mix, whose backends or precisions differ. Those that it leaves
            out have ``backend`` and the one precision of ``precisions``; without these, the adaptor
            is like the vision encoder.
        target: a device of ``targets``; what it cannot run is refused before any work.
        capacity: tokens of the KV cache; fixed at export in engines and packages, and the bundle's
            default. None selects that of the bundle that is extended, or 2048, or the model's
            number of positions if that is smaller.
        scales: folder of a scale table that ``calibrate`` made; None calibrates on the bundled
            images if a precision needs scales.
        adapters: folders or hub ids of LoRA adapters that are merged into the weights, in this
            order; ``FOLDER=WEIGHT`` multiplies the adapter's change.
        switchable_adapters: LoRA adapters that stay beside the weights and are selected at run time
            by their names: ``NAME=FOLDER`` or ``NAME=FOLDER=WEIGHT``.
        chat_template: ``checkpoint`` for the checkpoint's own chat template, if it has one, or
            ``built-in`` for the built-in prompt; None is ``checkpoint``.
        goldens: record the reference's outputs, which ``parity`` compares with, and compare the
            written files with the checkpoint.
        onnxruntime: options of ONNX Runtime.
        tensorrt: options of TensorRT and TensorRT-RTX.
        executorch: options of ExecuTorch.
    """

    checkpoint: str
    backend: str | None = None
    precisions: tuple[str, ...] = ()
    components: ComponentChoices = field(default_factory=ComponentChoices)
    target: str | None = None
    capacity: int | None = None
    scales: str | None = None
    adapters: tuple[str, ...] = ()
    switchable_adapters: tuple[str, ...] = ()
    chat_template: str | None = None
    goldens: bool = True
    onnxruntime: OnnxRuntimeOptions = field(default_factory=OnnxRuntimeOptions)
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)
    executorch: ExecuTorchOptions = field(default_factory=ExecuTorchOptions)

    @classmethod
    def read(cls, file: Path, checkpoint: str | None = None) -> ExportConfig:
        """Read a YAML file.

        Args:
            file: the YAML file.
            checkpoint: used in place of the file's.

        Raises:
            UserError: the file cannot be read, or a key is missing, unknown, or has a wrong type or
                value.
        """
        raw = read_yaml(file, "export config")
        if raw is None:
            raw = {}
        if isinstance(raw, dict) and checkpoint is not None:
            raw = {**raw, "checkpoint": checkpoint}
        config = _parse(cls, raw, file, "")
        _check_values(config, file)
        folder = file.parent
        return replace(
            config,
            checkpoint=_resolve_checkpoint(config.checkpoint, folder) if checkpoint is None else checkpoint,
            adapters=tuple(str(AdapterChoice.parse(text, folder)) for text in config.adapters),
            switchable_adapters=tuple(map(str, parse_named(config.switchable_adapters, folder))),
            precisions=tuple(_resolve_precision(precision, folder) for precision in config.precisions),
            components=ComponentChoices(
                **{name: _resolve_choice(text, folder) for name, text in config.components.chosen().items()}
            ),
            scales=str(folder / Path(config.scales).expanduser()) if config.scales else None,
        )

    def save(self, file: Path) -> None:
        """Write a YAML file; keys that have their defaults are left out."""
        file.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the YAML file."""
        return _without_defaults(self)

    def override(self, values: Mapping[str, Any]) -> ExportConfig:
        """Return the config with values replaced.

        Args:
            values: by key, for example ``capacity`` or ``tensorrt.version``; None and empty ones
                replace nothing.
        """
        config = self
        for key, value in values.items():
            if value is None or value == ():
                continue
            group, _, name = key.rpartition(".")
            if group:
                config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
            else:
                config = replace(config, **{name: value})
        return config

    def with_defaults(self) -> ExportConfig:
        """Return the config with its backend and precisions, or all components of a mix, filled in.

        Raises:
            UserError: a value is empty, two values contradict each other, there is no such target
                or backend, or the backend's libraries are not installed.
        """
        for name, value in self.to_dict().items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise UserError(f"The export's {name} is empty; give a value, or leave it out.")
        if self.switchable_adapters and self.onnxruntime.switchable is False:
            raise UserError(
                f"The export is not switchable, but has the switchable adapter {self.switchable_adapters[0]};"
                " leave one of them out."
            )
        if self.components.chosen():
            return self._with_all_components()
        device = find_target(self.target) if self.target else None
        backend = self.backend or (next(iter(device.backends)) if device else DEFAULT_BACKEND)
        supported = load_compiler(backend).PRECISIONS
        if device:
            supported = tuple(name for name in supported if name in device.backends.get(backend, supported))
        default = "fp32" if "fp32" in supported else supported[0]
        precisions = tuple(dict.fromkeys(self.precisions)) or (default,)
        if device:
            precisions = tuple(map(device.full_precision, precisions))
        return replace(self, backend=backend, precisions=precisions)

    def _with_all_components(self) -> ExportConfig:
        """Return the config of a mix with all its components.

        Raises:
            UserError: a component is missing, or the precision of the others is not clear.
        """
        if len(self.precisions) > 1:
            raise UserError("A mix has one precision for all components that it does not name; give one.")
        others = None
        if self.backend or self.precisions:
            if len(self.components.chosen()) == len(COMPONENTS):
                raise UserError(
                    "The mix names all components, so that a backend or precision for the others has no"
                    " effect; leave it out, or leave a component out."
                )
            rest = replace(self, components=ComponentChoices()).with_defaults()
            others = f"{rest.backend}:{rest.precisions[0]}"
        return replace(self, backend=None, precisions=(), components=self.components.filled(others))

    def compile_options(self, capacity: int) -> CompileOptions:
        """Return the options for the compiler.

        Args:
            capacity: of the KV cache, for a config that leaves it open.

        Raises:
            UserError: there is no such target.
        """
        return CompileOptions(
            target=find_target(self.target) if self.target else None,
            capacity=self.capacity or capacity,
            onnxruntime=replace(
                self.onnxruntime,
                switchable=self.onnxruntime.switchable or bool(self.switchable_adapters) or None,
            ),
            tensorrt=self.tensorrt,
            executorch=self.executorch,
        )


def is_plan_file(precision: str) -> bool:
    """Whether a precision is the YAML file of a plan, not the name of a shipped one."""
    return precision.endswith(PLAN_SUFFIXES)


def _resolve_checkpoint(checkpoint: str, folder: Path) -> str:
    """Return the folder beside the config file, if there is one; else a hub id or ``tiny``."""
    path = folder / Path(checkpoint).expanduser()
    return str(path) if checkpoint != "tiny" and path.is_dir() else checkpoint


def _resolve_precision(precision: str, folder: Path) -> str:
    return str(folder / Path(precision).expanduser()) if is_plan_file(precision) else precision


def _resolve_choice(text: str, folder: Path) -> str:
    """Return ``BACKEND:PRECISION`` with the file of a plan beside the config file."""
    backend, colon, precision = text.partition(":")
    return f"{backend}{colon}{_resolve_precision(precision, folder)}"


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _without_defaults(config: Any) -> dict[str, Any]:
    """Return the values that differ from their defaults as YAML values."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if not _is_required(item) and value == _default(item):
            continue
        if is_dataclass(value):
            value = _without_defaults(value)
        values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def _parse(cls: type[Config], raw: Any, file: Path, prefix: str) -> Config:
    """Return a config dataclass from a YAML mapping.

    Args:
        cls: the dataclass.
        raw: the mapping.
        file: named in errors.
        prefix: of the keys in errors, for example ``tensorrt.``.
    """
    hints = get_type_hints(cls)
    if not isinstance(raw, dict):
        where = f"the key {prefix.rstrip('.')!r}" if prefix else "it"
        raise UserError(f"{file} is not an export config: {where} must be a mapping of {', '.join(hints)}.")
    for key in raw:
        if key not in hints:
            raise UserError(f"{file} has the unknown key '{prefix}{key}'; the keys are {', '.join(hints)}.")
    for item in fields(cls):  # type: ignore[arg-type]
        if _is_required(item) and item.name not in raw:
            raise UserError(f"{file} has no key {prefix + item.name!r}; add it, or give it as an argument.")
    values = {key: _value(hints[key], value, file, prefix + key) for key, value in raw.items()}
    return cls(**values)


def _value(hint: Any, raw: Any, file: Path, key: str) -> Any:
    """Return a YAML value as the type of its field."""
    if is_dataclass(hint):
        return _parse(hint, raw, file, f"{key}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if isinstance(raw, list) and "" in raw:
            raise UserError(f"{file}: the key {key!r} has an empty item; remove it.")
        if isinstance(raw, list) and all(type(value) is item for value in raw):
            return tuple(raw)
        raise UserError(f"{file}: the key {key!r} must be a list, each item {TYPE_NAMES[item]}, got {raw!r}.")
    choices = get_args(hint) or (hint,)
    if raw == "":
        raise UserError(f"{file}: the key {key!r} is empty; give it a value or remove it.")
    if type(raw) in choices:
        return raw
    expected = TYPE_NAMES[next(choice for choice in choices if choice is not NoneType)]
    quotes = "; write it in quotes" if str in choices and isinstance(raw, (int, float)) else ""
    raise UserError(f"{file}: the key {key!r} must be {expected}, got {raw!r}{quotes}.")


def _check_values(config: ExportConfig, file: Path) -> None:
    """Check the values that can be judged without the checkpoint.

    Raises:
        UserError: names the file, the key and the choices.
    """
    if config.capacity is not None and config.capacity < 1:
        raise UserError(f"{file}: the key 'capacity' must be at least 1, got {config.capacity}.")
    for sm in config.tensorrt.capabilities:
        if sm < 1:
            raise UserError(f"{file}: the key 'tensorrt.capabilities' must hold positive numbers, got {sm}.")
    for key, value, choices in (
        ("backend", config.backend, [*compiler_names(), AUTO]),
        ("chat_template", config.chat_template, CHAT_TEMPLATES),
        ("executorch.delegate", config.executorch.delegate, DELEGATES),
    ):
        if value is not None and value not in choices:
            raise UserError(f"{file}: the key {key!r} must be one of {', '.join(choices)}, got {value!r}.")
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("precisions", partial(load_precision, precision))
        for precision in config.precisions
        if not is_plan_file(precision)
    ]
    checks += [
        (f"components.{component}", partial(_check_choice, component, text))
        for component, text in config.components.chosen().items()
    ]
    if config.target:
        checks.append(("target", partial(find_target, config.target)))
    if config.tensorrt.version:
        checks.append(("tensorrt.version", CompileOptions(tensorrt=config.tensorrt).tensorrt_version))
    for key, check in checks:
        try:
            check()
        except UserError as error:
            raise UserError(f"{file}: the key {key!r} has a wrong value. {error}") from error


def _check_choice(component: str, text: str) -> None:
    """Check the backend and the precision of a component.

    Raises:
        UserError: there is no such backend or precision.
    """
    backend, precision = parse_choice(component, text)
    if backend not in compiler_names():
        raise UserError(f"There is no backend {backend!r}; use one of {', '.join(compiler_names())}.")
    if not is_plan_file(precision):
        load_precision(precision)
