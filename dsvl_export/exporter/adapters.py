"""Switchable LoRA adapters of a bundle: their stages, and changes without a rebuild."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.switchable_adapter import layer_matrices, matrix_bytes, open_switchable
from dsvl_export.compilers.precisions import precision_folder
from dsvl_export.exporter import stage_code
from dsvl_export.exporter.manifest import ADAPTERS, plan_hashes, takes_adapters
from dsvl_export.exporter.stages import Report, Stage, StageProgress, StageRunner
from dsvl_export.exporter.staging import Staging
from dsvl_export.version import __version__, code_digest
from reference.checkpoint.checkpoint import parameter_shapes
from reference.checkpoint.lora_adapter import Adapter, AdapterChoice
from reference.model.config import ModelConfig
from runtimes.backends.capabilities import SwitchesAdapters
from runtimes.backends.onnxruntime_adapters import SUFFIX, down_name, up_name, write_adapter
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import sha256_of_text
from runtimes.bundle.manifest import Artifact, Manifest, SwitchableAdapter
from runtimes.errors import UserError
from runtimes.hub import HubId

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class NamedChoice:
    """An adapter, and the name by which users of the bundle select it."""

    name: str
    choice: AdapterChoice

    @classmethod
    def parse(cls, text: str, relative_to: Path = Path()) -> NamedChoice:
        """Read ``NAME=FOLDER`` or ``NAME=FOLDER=WEIGHT``.

        Raises:
            UserError: the name or the weight is malformed.
        """
        name, separator, choice = text.partition("=")
        if not separator or not choice:
            raise UserError(f"Give a switchable adapter as NAME=FOLDER, not {text!r}.")
        check_name(name)
        return cls(name, AdapterChoice.parse(choice, relative_to))

    def __str__(self) -> str:
        """Return the form that ``parse`` reads."""
        return f"{self.name}={self.choice}"


def parse_named(texts: Iterable[str], relative_to: Path = Path()) -> tuple[NamedChoice, ...]:
    """Read the switchable adapters of a command or config.

    Raises:
        UserError: one is malformed, or two have one name, or names that differ only in case.
    """
    found = tuple(NamedChoice.parse(text, relative_to) for text in texts)
    for place, item in enumerate(found):
        if item.name in (other.name for other in found[:place]):
            raise UserError(f"Two adapters have the name {item.name!r}; give each its own.")
        refuse_similar_name(item.name, [other.name for other in found[:place]])
    return found


def refuse_similar_name(name: str, others: Iterable[str]) -> None:
    """Check that no other name differs only in case: some file systems do not tell them apart.

    Raises:
        UserError: one does.
    """
    for other in others:
        if other != name and other.casefold() == name.casefold():
            raise UserError(
                f"The names of the adapters {other!r} and {name!r} differ only in case; use another name."
            )


def check_name(name: str) -> None:
    """Check that a name can be a file name and a model's name.

    Raises:
        UserError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name[:80]!r} cannot be the name of an adapter; use up to 64 letters, digits, '.', '_' and '-',"
            " and begin with a letter or digit."
        )


@dataclass(frozen=True)
class NamedAdapter:
    """A switchable adapter that has been read."""

    name: str
    adapter: Adapter
    origin: str

    @classmethod
    def open(cls, named: NamedChoice, config: ModelConfig) -> NamedAdapter:
        """Read an adapter for a model.

        Raises:
            UserError: it cannot be read or does not fit, or has to be merged into the weights.
        """
        adapter = open_switchable(named.choice, config, parameter_shapes(config))
        folder = named.choice.folder
        hub_id = None if folder.is_dir() else HubId.parse(folder)
        origin = f"{hub_id.repository}@{adapter.folder.name}" if hub_id else folder.resolve().name
        return cls(named.name, adapter, origin)

    def check_range(self, config: ModelConfig, folder: Path, precision: str, base: str) -> None:
        """Check that all values can be stored, before anything is written.

        Args:
            config: of the base model.
            folder: of the bundle, whose scales are used if they are there.
            precision: of the decoder.
            base: its precision where it is not quantized.

        Raises:
            UserError: a value exceeds the range of the base.
        """
        for _ in layer_matrices(self.adapter, config, folder / precision_folder(precision), base):
            pass

    def stage(self, staging: Staging, config: ModelConfig, backend: str, precision: str, base: str) -> Stage:
        """Return the stage that writes the adapter's file for a decoder of a bundle."""
        name = f"{ADAPTERS}/{backend}/{precision}/{self.name}"

        def inputs() -> dict[str, Any]:
            return {
                "adapter": self.digest,
                "version": __version__,
                "code": code_digest(stage_code.ADAPTERS),
                **plan_hashes(staging, precision),
            }

        def build(folder: Path, progress: StageProgress) -> dict[str, Any]:
            scales = staging.folder / precision_folder(precision)
            tensors: dict[str, np.ndarray] = {}
            for layer, (down, up) in layer_matrices(self.adapter, config, scales, base):
                tensors |= {down_name(layer): down, up_name(layer): up}
            file = folder / f"{self.name}{SUFFIX}"
            write_adapter(file, tensors)
            entry = self._entry(backend, precision, f"{name}/{file.name}")
            return {"adapter": asdict(entry), "depends_on": plan_hashes(staging, precision)}

        return Stage(name, inputs, build, bytes=partial(matrix_bytes, self.adapter, base))

    @property
    def digest(self) -> str:
        """The SHA-256 of the adapter's files and weight."""
        return sha256_of_text("\n".join(self.adapter.identity()))

    def _entry(self, backend: str, precision: str, file: str) -> SwitchableAdapter:
        changes = self.adapter.changes
        layers = {change.target.parameter.removesuffix(".weight") for change in changes}
        targets = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
        rank = max(self.adapter.rank(change.module) for change in changes)
        return SwitchableAdapter(self.name, backend, precision, file, rank, targets, self.digest, self.origin)


def refuse_backend(backend: str) -> None:
    """Check that a backend can switch adapters.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(load_backend(backend), SwitchesAdapters):
        raise UserError(
            f"The backend {backend} cannot switch adapters; merge the adapter into the weights with"
            " --adapter."
        )


def add_adapters(
    folder: Path, named: Sequence[NamedChoice], report: Report = lambda progress: None
) -> list[SwitchableAdapter]:
    """Add adapters to every switchable decoder of a bundle; those of the same names are replaced.

    Nothing else is built again: neither the checkpoint nor the other files are read.

    Args:
        folder: of the bundle.
        named: the adapters.
        report: is called with progress.

    Returns:
        The new entries of the manifest.

    Raises:
        UserError: the bundle has no switchable decoder, or an adapter cannot be used.
    """
    with _changing(folder) as (bundle, staging):
        decoders = _switchable_decoders(bundle)
        names = [*(item.name for item in bundle.manifest.adapters), *(choice.name for choice in named)]
        for choice in named:
            refuse_similar_name(choice.name, names)
        config = ModelConfig.from_dict(bundle.manifest.model)
        adapters = [NamedAdapter.open(item, config) for item in named]
        for adapter in adapters:
            for item in decoders:
                adapter.check_range(config, folder, item.precision, item.base)
        stages = [
            adapter.stage(staging, config, item.backend, item.precision, item.base)
            for adapter in adapters
            for item in decoders
        ]
        runner = StageRunner(staging, report)
        runner.make_room(stages)
        runner.run(stages)
        results = [staging.result(stage.name) or {} for stage in stages]
        added = [SwitchableAdapter.from_dict(result["adapter"]) for result in results]
        _publish(bundle, staging, {item.file for item in added}, added)
        return added


def remove_adapters(folder: Path, names: Sequence[str]) -> list[SwitchableAdapter]:
    """Remove adapters from a bundle.

    Returns:
        The entries that the manifest had.

    Raises:
        UserError: the bundle has no adapter of a name.
    """
    with _changing(folder) as (bundle, staging):
        known = bundle.manifest.adapters
        for name in names:
            if name not in {item.name for item in known}:
                has = ", ".join(dict.fromkeys(item.name for item in known)) or "none"
                raise UserError(f"The bundle {folder} has no adapter {name!r}; it has {has}.")
        removed = [item for item in known if item.name in names]
        for item in removed:
            staging.forget(item.file.rpartition("/")[0])
        _publish(bundle, staging, {item.file for item in removed}, [])
        return removed


@contextmanager
def _changing(folder: Path) -> Iterator[tuple[Bundle, Staging]]:
    """Open a bundle to change its adapters."""
    staging = Staging(folder)
    try:
        bundle = staging.bundle()
        staging.open()
        staging.refuse_unfinished_export(bundle, _is_adapter)
        yield bundle, staging
    except OSError as error:
        raise UserError(
            f"The adapters of {folder} cannot be changed: {error.strerror or error}; fix this and run the"
            " same command again."
        ) from error
    finally:
        staging.close()


def _is_adapter(path: str) -> bool:
    return path.startswith(f"{ADAPTERS}/")


def _switchable_decoders(bundle: Bundle) -> list[Artifact]:
    """Return the decoders that take adapters.

    Raises:
        UserError: there is none.
    """
    decoders = [item for item in bundle.manifest.artifacts if item.component == "decoder"]
    found = [item for item in decoders if takes_adapters(item)]
    if found:
        return found
    able = [item for item in decoders if isinstance(load_backend(item.backend), SwitchesAdapters)]
    names = ", ".join(f"{item.backend} {item.precision}" for item in able or decoders)
    if able:
        raise UserError(
            f"The bundle {bundle.folder} was exported without switchable adapters ({names}); export it again"
            " with --switchable."
        )
    raise UserError(
        f"The bundle {bundle.folder} is for {names}, which cannot switch adapters; merge the adapter into"
        " the weights with 'dsvl-export export --adapter'."
    )


def _publish(
    bundle: Bundle, staging: Staging, replaced: set[str], added: Sequence[SwitchableAdapter]
) -> None:
    """Write the manifest with new adapters in the place of those with ``replaced`` files."""

    def make(now: Manifest | None) -> Manifest:
        manifest = now or bundle.manifest
        kept = [item for item in manifest.adapters if item.file not in replaced]
        files = {path: entry for path, entry in manifest.files.items() if path not in replaced}
        files |= {item.file: staging.files()[item.file] for item in added}
        return replace(manifest, adapters=(*kept, *added), files=dict(sorted(files.items())))

    staging.finish(make)
