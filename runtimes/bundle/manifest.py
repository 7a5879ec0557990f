"""The manifest of a bundle: its artifacts and contracts, and the size and hash of every file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import fastjsonschema

from runtimes.bundle.contracts import Contract, check_contracts
from runtimes.bundle.mixes import COMPONENTS, MIXED, Mix, Pair
from runtimes.errors import UserError
from runtimes.preprocess import PreprocessSpec
from runtimes.text.tokenizer import PromptSpec

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).parent / "manifest.schema.json"
MANIFEST = "manifest.json"
STAGING = ".staging"  # folder of an unfinished export
TOKENIZER = "tokenizer/tokenizer.json"  # a copy of the checkpoint's
DEBUG_PREFIX = ".debug-"  # of folders for debug builds, which parity deletes when it ends
# Files that a parity verdict depends on, besides the artifacts.
JUDGED_WITH = (
    "goldens/",
    "layers/",
    "long/",
    "noise/",  # until 0.4, for quantization_error/
    "precisions/",
    "prefix/",
    "quantization_error/",
    "token_embedding/",
    "tokenizer/",
)


@dataclass(frozen=True)
class FileEntry:
    """The size in bytes and the SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine of an artifact.

    Args:
        file: path in the bundle.
        sm: compute capabilities that it runs on.
        gpu: GPU of the machine that built it; empty where the build needed none.
        driver: driver of that machine.
        tensorrt: version of the library that built it.
        capacity: tokens of the KV cache.
        max_batch: most rows that decode together.
        options: further build options, as ``version-compatible``.
        platform: platform of the machine that built it, as ``aarch64``; empty where any will do.
    """

    file: str
    sm: tuple[int, ...]
    gpu: str
    driver: str
    tensorrt: str
    capacity: int
    max_batch: int
    options: tuple[str, ...] = ()
    platform: str = ""


@dataclass(frozen=True)
class Artifact:
    """One component compiled for one backend in one precision.

    Args:
        component: ``vision_encoder``, ``adaptor`` or ``decoder``.
        backend: name of the backend.
        precision: name of the precision.
        target: name of the target, as in ``targets.yaml``.
        dialect: dialect of the operators in its files.
        files: paths in the bundle, the main file first.
        tools: names and versions of the libraries that made it.
        engine: its TensorRT engine, if one was built.
        base: precision of the layers that are not quantized.
        capacity: tokens of a decoder's KV cache, where compilation fixed them.
        activation_bytes: planned size of its intermediate tensors, for one image or a chunk of a
            prompt; 0 where it is not known.
        activation_bytes_per_token: their growth per token of the KV cache's capacity.
        quantizes_activations: whether activations or the KV cache are quantized; None in manifests
            of dsvl-export 0.4.
        audited: SHA-256 of each file that the export read back and compared with the checkpoint and
            the precision plan; empty where it did not.
    """

    component: str
    backend: str
    precision: str
    target: str
    dialect: str
    files: tuple[str, ...]
    tools: dict[str, str]
    engine: Engine | None = None
    base: str = "fp32"
    capacity: int | None = None
    activation_bytes: int = 0
    activation_bytes_per_token: int = 0
    quantizes_activations: bool | None = None
    audited: dict[str, str] = field(default_factory=dict)

    @property
    def exact_rows(self) -> bool:
        """Whether one call with several tokens and single calls differ by float rounding only.

        With quantized activations or a quantized KV cache, a difference in the last bit can become
        one of a whole quantization step. dsvl-export 0.4 did not record whether they are quantized;
        its quantized precisions count as such.
        """
        return (
            self.precision == self.base
            if self.quantizes_activations is None
            else not self.quantizes_activations
        )

    @property
    def stage(self) -> str:
        """Folder of its files, ``<backend>/<precision>/<component>`` or a shared one."""
        return "/".join(self.files[0].split("/")[:3])

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Artifact:
        """Build an artifact from its JSON object, which the schema has checked."""
        engine = raw.get("engine")
        if engine:
            lists = {key: tuple(engine[key]) for key in ("sm", "options")}
            engine = Engine(**{**engine, **lists})
        return cls(**{**raw, "files": tuple(raw["files"]), "engine": engine})


@dataclass(frozen=True)
class SwitchableAdapter:
    """A LoRA adapter that the runtime applies to a decoder of the bundle on demand.

    Args:
        name: the name by which users select it.
        backend: of the decoder.
        precision: of the decoder.
        file: path in the bundle.
        rank: largest rank of its layers.
        targets: names of the layers that it changes, without the number of the layer.
        digest: SHA-256 of the adapter's own files and its weight.
        origin: folder or hub id that it was added from.
    """

    name: str
    backend: str
    precision: str
    file: str
    rank: int
    targets: tuple[str, ...]
    digest: str
    origin: str

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> SwitchableAdapter:
        """Build an adapter from its JSON object, which the schema has checked."""
        return cls(**{**raw, "targets": tuple(raw["targets"])})


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``; the JSON schema is ``manifest.schema.json``."""

    model: dict[str, Any]
    checkpoint: dict[str, Any]
    preprocessing: PreprocessSpec
    prompt: PromptSpec
    token_embedding: str
    default_capacity: int
    contracts: dict[str, dict[str, Contract]]  # precision → component → contract
    artifacts: tuple[Artifact, ...]
    files: dict[str, FileEntry]  # path → entry, for every file but the manifest and the reports
    parity: dict[str, Any] = field(default_factory=dict)  # backend/precision → verdict
    adapters: tuple[SwitchableAdapter, ...] = ()
    mixes: tuple[Mix, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; without adapters and mixes, older releases can read it."""
        raw = asdict(self)
        return {key: value for key, value in raw.items() if value or key not in ("adapters", "mixes")}

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Manifest:
        """Check a JSON object and build the manifest from it.

        Args:
            raw: the JSON object.
            where: name of its file, for errors.

        Raises:
            UserError: a key is missing or malformed, a path leads outside the bundle, or the schema
                version is unknown.
        """
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema version {raw.get('schema_version')!r}, this release reads"
                f" {SCHEMA_VERSION}; export into a new folder or use the matching dsvl-export."
            )
        try:
            _validator()(raw)
        except fastjsonschema.JsonSchemaValueException as error:
            raise UserError(f"{where} is not a valid manifest: {error.message[:300]}.") from error
        manifest = cls(
            model=raw["model"],
            checkpoint=raw["checkpoint"],
            preprocessing=PreprocessSpec.from_dict(raw["preprocessing"]),
            prompt=PromptSpec.from_dict(raw["prompt"]),
            token_embedding=raw["token_embedding"],
            default_capacity=raw["default_capacity"],
            contracts={
                precision: {name: Contract.from_dict(contract) for name, contract in table.items()}
                for precision, table in raw["contracts"].items()
            },
            artifacts=tuple(map(Artifact.from_dict, raw["artifacts"])),
            files={path: FileEntry(**entry) for path, entry in raw["files"].items()},
            parity=raw["parity"],
            adapters=tuple(map(SwitchableAdapter.from_dict, raw.get("adapters", []))),
            mixes=tuple(map(Mix.from_dict, raw.get("mixes", []))),
        )
        for precision, table in manifest.contracts.items():
            try:
                check_contracts(manifest.model, table)
            except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
                raise UserError(
                    f"{where} has contracts for {precision} that do not fit its model: {str(error)[:300]};"
                    " export the bundle again."
                ) from error
        if manifest.default_capacity > manifest.model["decoder"]["max_positions"]:
            raise UserError(
                f"{where} has the default capacity {manifest.default_capacity}, more than the model's"
                f" {manifest.model['decoder']['max_positions']} positions; export the bundle again."
            )
        for artifact in manifest.artifacts:
            if artifact.precision not in manifest.contracts:
                raise UserError(f"{where} has {artifact.precision} artifacts but no contracts for them.")
            for name in (artifact.backend, artifact.precision, artifact.component):
                if "/" in name or not stays_inside(name):  # used as names of folders
                    raise UserError(f"{where} has the name {name!r}, which cannot be the name of a file.")
        keys = [(adapter.name, adapter.backend, adapter.precision) for adapter in manifest.adapters]
        if len(set(keys)) < len(keys):
            raise UserError(f"{where} has two adapters of one name; export the bundle again.")
        for adapter in manifest.adapters:  # its folder is removed with it
            folder = f"adapters/{adapter.backend}/{adapter.precision}/{adapter.name}"
            if adapter.file.rpartition("/")[0] != folder:
                raise UserError(
                    f"{where} has the file {adapter.file!r} for the adapter {adapter.name!r}, expected one in"
                    f" {folder}; export the bundle again."
                )
        for mix in manifest.mixes:
            manifest._check_mix(mix, where)
        if len({mix.name for mix in manifest.mixes}) < len(manifest.mixes):
            raise UserError(f"{where} has a mix twice; export the bundle again.")
        for path in manifest.paths():
            if not stays_inside(path):
                raise UserError(f"{where} names {path!r}, which lies outside the bundle.")
            if path not in manifest.files:
                raise UserError(f"{where} names {path!r} but has no size and hash for it.")
        return manifest

    def pairs_of(self, backend: str, precision: str) -> set[Pair]:
        """Return the backends and precisions of a choice; several of a mix."""
        if backend != MIXED:
            return {(backend, precision)}
        return {pair for mix in self.mixes if mix.name == precision for pair in mix.components.values()}

    def judged_files(self, backend: str, precision: str) -> dict[str, FileEntry]:
        """Return the files that the parity verdict on a choice of ``list_choices`` is about."""
        pairs = self.pairs_of(backend, precision)
        stages = {f"{item.stage}/" for item in self.artifacts if (item.backend, item.precision) in pairs}
        judged = (*stages, f"{backend}/{precision}/", *JUDGED_WITH)
        return {path: entry for path, entry in self.files.items() if path.startswith(judged)}

    def _check_mix(self, mix: Mix, where: str) -> None:
        """Check that a mix has all its artifacts, and that they fit to each other.

        Raises:
            UserError: an artifact is missing, or two neighbors have tensors of different dtypes.
        """
        present = {(item.component, item.backend, item.precision) for item in self.artifacts}
        for component, pair in mix.components.items():
            if (component, *pair) not in present:
                raise UserError(
                    f"{where} has the mix {mix.name} without its {component} ({' '.join(pair)}); export it"
                    " again."
                )
        contracts = {name: self.contracts[pair[1]][name] for name, pair in mix.components.items()}
        mix.check_borders({name: item.inputs[0].dtype for name, item in contracts.items()}, f"{where}: ")

    def paths(self) -> Iterable[str]:
        """Yield every path that the manifest names."""
        yield from self.files
        yield self.token_embedding
        for artifact in self.artifacts:
            yield from artifact.files
            if artifact.engine:
                yield artifact.engine.file
        for adapter in self.adapters:
            yield adapter.file


def list_choices(artifacts: Iterable[Artifact], mixes: Iterable[Mix]) -> list[Pair]:
    """Return what can run: pairs that have all components, in their order, then mixes."""
    present: dict[Pair, set[str]] = {}
    for item in artifacts:
        present.setdefault((item.backend, item.precision), set()).add(item.component)
    complete = [pair for pair, components in present.items() if components.issuperset(COMPONENTS)]
    return [*complete, *((MIXED, mix.name) for mix in mixes)]


def stays_inside(path: str) -> bool:
    """Return whether a path of a manifest leads to something inside the bundle's folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path[0] != "/" and ".." not in parts and not set(path) & set("\\:\0")


@cache
def _validator() -> Callable[[Any], Any]:
    """Return the schema's validator; compiling it takes longer than everything else here."""
    validate: Callable[[Any], Any] = fastjsonschema.compile(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return validate
