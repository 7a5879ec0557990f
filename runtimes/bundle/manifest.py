"""The bundle: a folder with a manifest that names, sizes and hashes every file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import fastjsonschema

from runtimes.bundle.contracts import Contract, check_contracts
from runtimes.errors import UserError
from runtimes.preprocess import PreprocessSpec
from runtimes.text.tokenizer import PromptSpec

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).parent / "manifest.schema.json"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"  # the checkpoint's, as it is
DEBUG_PREFIX = ".debug-"  # of folders for debug builds; they live as long as parity takes the taps
# What a verdict rests on, besides the artifacts themselves.
JUDGED_WITH = ("goldens/", "layers/", "long/", "noise/", "precisions/", "tokenizer/", "token_embedding/")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine of an artifact: its file, what it was built for, and on what.

    Args:
        sm: compute capabilities that it runs on.
        gpu, driver, platform: of the machine that built it; empty where no GPU was needed.
        tensorrt: version of the library that built it.
        capacity, max_batch: of the KV cache, and rows that decode together.
        options: names of what else it was built with, as ``version-compatible``.
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
    """One component compiled for one backend: its main file first, data files and engine after.

    ``base`` is what is not quantized computes in. ``capacity`` is that of a decoder whose KV cache was fixed
    when it was compiled. ``activation_bytes`` is what ``plan`` says of its intermediate tensors, for one
    image or a chunk of a prompt, and ``activation_bytes_per_token`` how they grow with the capacity of the
    KV cache; 0 where that is not known. ``quantizes_activations`` includes the KV cache's quantization.
    ``audited`` has the SHA-256 of each file that export read back and found equal to what the checkpoint and
    the plan make of it; empty where it did not compare them.
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
        """Whether several tokens in one call give the logits of single calls but for float rounding.

        Quantized activations or KV caches turn a difference in the last bit into one of a whole step now
        and then. dsvl-export 0.4 did not record them: its quantized precisions count as such.
        """
        return (
            self.precision == self.base
            if self.quantizes_activations is None
            else not self.quantizes_activations
        )

    @property
    def stage(self) -> str:
        """Folder of its files in the bundle: ``<backend>/<precision>/<component>``, or what it shares."""
        return "/".join(self.files[0].split("/")[:3])

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Artifact:
        """Of the object in a manifest, which its schema has checked."""
        engine = raw.get("engine")
        if engine:
            lists = {key: tuple(engine[key]) for key in ("sm", "options")}
            engine = Engine(**{**engine, **lists})
        return cls(**{**raw, "files": tuple(raw["files"]), "engine": engine})


@dataclass(frozen=True)
class Manifest:
    """All that ``manifest.json`` says; the JSON schema is ``runtimes/manifest.schema.json``."""

    model: dict[str, Any]
    checkpoint: dict[str, str]
    preprocessing: PreprocessSpec
    prompt: PromptSpec
    token_embedding: str
    default_capacity: int
    contracts: dict[str, dict[str, Contract]]  # precision → component → contract
    artifacts: tuple[Artifact, ...]
    files: dict[str, FileEntry]  # path → entry, for every file but the manifest and the reports
    parity: dict[str, Any] = field(default_factory=dict)  # backend/precision → verdict
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Manifest:
        """Inverse of ``to_dict``.

        Raises:
            UserError: a key is missing or malformed, a path leaves the bundle, or the schema
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
            raise UserError(f"{where} is no valid manifest: {error.message[:300]}.") from error
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
                if "/" in name or not stays_inside(name):  # they become names of folders and reports
                    raise UserError(f"{where} has the name {name!r}, which cannot be that of a file.")
        for path in manifest.paths():
            if not stays_inside(path):
                raise UserError(f"{where} names {path!r}, which lies outside the bundle.")
            if path not in manifest.files:
                raise UserError(f"{where} names {path!r} but has no size and hash for it.")
        return manifest

    def paths(self) -> Iterable[str]:
        """Every path that the manifest names."""
        yield from self.files
        yield self.token_embedding
        for artifact in self.artifacts:
            yield from artifact.files
            if artifact.engine:
                yield artifact.engine.file


def stays_inside(path: str) -> bool:
    """Whether a relative path, as a bundle's files have them, names something below the folder it is of."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path[0] != "/" and ".." not in parts and not set(path) & set("\\:\0")


@cache
def _validator() -> Callable[[Any], Any]:
    """Return the schema's validator; compiling it takes longer than everything else here."""
    validate: Callable[[Any], Any] = fastjsonschema.compile(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return validate
