"""Weight files: safetensors or torch files, single or sharded, read one tensor at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference.checkpoint.file_signature import check_file_signature
from reference.checkpoint.folder_content import (
    SHARD,
    WEIGHT_FILES,
    join_names,
    other_files_hint,
    subfolder_hint,
    trainer_shards_hint,
)
from reference.checkpoint.layouts import Shape
from reference.checkpoint.legacy_bin import LegacyFile, LegacyTensor
from reference.settings import format_value
from runtimes.bundle.files import read_json
from runtimes.errors import UserError, first_line

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)
MERGE_ADAPTER_HINT = (
    "merge the adapter into its base model first (in PEFT: merge_and_unload) and save the result"
)

# safetensors' dtype codes by PyTorch's names; other codes are shown unchanged.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
           "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
           "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip
# Keys under which training frameworks store the table of tensors inside a .bin file.
_TABLE_KEYS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class StoredTensor:
    """Dtype and shape of a tensor in a file; ``nbytes`` is its size in the file."""

    dtype: str
    shape: Shape
    nbytes: int


class _TensorFile(Protocol):
    """A file of named tensors."""

    def table(self) -> dict[str, StoredTensor]: ...

    def load(self, name: str) -> Tensor: ...


class TensorFiles:
    """The weight files of a checkpoint folder; ``stored`` has dtype and shape of each tensor."""

    def __init__(self, folder: Path, main: Path | None = None) -> None:
        """Find and open the files.

        Args:
            folder: the folder with the weights.
            main: the file of all tensors; None finds it, or the index of the shards.

        Raises:
            UserError: a file is missing, cut short, or not a file of tensors.
        """
        main = main or _find_weight_file(folder)
        index = _read_index(main) if main and main.suffix == ".json" else {}
        self.files = list(dict.fromkeys(index.values())) or ([main] if main else _find_shards(folder))
        self.stored: dict[str, StoredTensor] = {}
        self._file_of: dict[str, _TensorFile] = {}
        for file in self.files:
            if not file.exists():
                raise UserError(
                    f"The weight shard {file} is missing; download it again{_other_weights(main)}."
                )
            opened = _open_tensor_file(file)
            table = opened.table()
            if not index and (double := sorted(table.keys() & self.stored.keys())):
                raise UserError(f"{join_names(double)} are in two of the shards in {folder}; remove one.")
            table = {
                name: stored
                for name, stored in table.items()
                if name not in self.stored or index.get(name) == file
            }
            self.stored |= table
            self._file_of |= dict.fromkeys(table, opened)
        absent = sorted(index.keys() - self.stored.keys())
        if absent:
            raise UserError(
                f"{main} lists {join_names(absent)}, which {index[absent[0]].name} does not contain;"
                " download the shards and the index again."
            )

    def load(self, name: str) -> Tensor:
        """Load a tensor in its stored dtype."""
        return self._file_of[name].load(name)


def _find_weight_file(folder: Path) -> Path | None:
    """Find the weight file, or the index of the shards."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)


def _find_shards(folder: Path) -> list[Path]:
    """Find the shards of a folder without an index; ``-00001-of-00003`` says how many there are."""
    sets: dict[tuple[str, str, int], dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(file.name):
            key = (match["stem"], match["suffix"], int(match["count"]))
            sets.setdefault(key, {})[int(match["number"])] = file
    complete = [
        shards
        for (_, _, count), shards in sets.items()
        if len(shards) == count and min(shards) == 1 and max(shards) == count
    ]
    if len(complete) == 1:
        return list(complete[0].values())
    if complete:
        names = join_names([next(iter(shards.values())).name for shards in complete])
        raise UserError(f"{folder} holds several sets of weight shards ({names}, ...); keep one of them.")
    if sets:
        (stem, suffix, count), shards = next(iter(sets.items()))
        raise UserError(
            f"{folder} holds {len(shards)} of {count} weight shards {stem}-*{suffix}, and the index"
            f" {stem}{suffix}.index.json of its shards is missing; download both again."
        )
    raise UserError(
        f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}"
        f"{trainer_shards_hint(folder) or subfolder_hint(folder) or other_files_hint(folder)}."
    )


def _other_weights(index: Path | None) -> str:
    """Return a clause about another weight file beside an index whose shards are missing."""
    others = [
        name for name in WEIGHT_FILES if index and (index.parent / name).exists() and name != index.name
    ]
    return f", or delete {index} if {others[0]} holds the weights" if others else ""


def _read_index(file: Path) -> dict[str, Path]:
    """Read the index of the shards; returns tensor name → shard."""
    check_file_signature(file)
    table = read_json(file).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{file} has no weight_map, so its shards cannot be found; download it again.")
    for shard in table.values():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or not shard.endswith((".safetensors", ".bin"))
        ):
            raise UserError(
                f"{file} lists the shard {format_value(shard)},"
                " expected the name of a file in the same folder."
            )
    return {name: file.parent / shard for name, shard in table.items()}


def _open_tensor_file(file: Path) -> _TensorFile:
    check_file_signature(file)
    return _TorchFile(file) if file.suffix == ".bin" else _SafetensorsFile(file)


class _SafetensorsFile:
    """A ``.safetensors`` file, opened for each tensor so that the system can free its pages."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def table(self) -> dict[str, StoredTensor]:
        stored = {}
        with self._open() as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                code, shape = part.get_dtype(), tuple(part.get_shape())
                dtype = _DTYPES.get(code, code)
                size = getattr(torch, dtype).itemsize if hasattr(torch, dtype) else 1
                stored[name] = StoredTensor(dtype, shape, size * prod(shape))
        return stored

    def load(self, name: str) -> Tensor:
        with self._open() as handle:
            return handle.get_tensor(name)

    def _open(self) -> Any:
        try:
            return safe_open(self._file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"The weight file {self._file} is damaged or cut short ({first_line(error)});"
                " download it again."
            ) from error


class _TorchFile:
    """A ``.bin`` file of either PyTorch format, memory-mapped; pickles with code are refused."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._legacy: LegacyFile | None = None
        try:
            with file.open("rb") as handle:
                zipped = handle.read(2) == b"PK"
            if zipped:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                self._legacy = LegacyFile(file)
                content = self._legacy.content
        except Exception as error:  # torch and pickle raise many types for damaged files
            # The rest of torch's message explains how to run the code, so it is left out.
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it refers to {code[1]}" if code else first_line(error).split(". ")[0]
            raise UserError(
                f"{file} cannot be read as plain weights (it is damaged or holds code): {reason}."
                " Download it again, or save the weights as safetensors."
            ) from error
        table = next(filter(_is_table, (content, *_nested_tables(content))), None)
        if table is None:
            raise UserError(f"{file} holds no table of tensors, so it is not a weight file.")
        self._content: dict[str, Tensor | LegacyTensor] = table

    def table(self) -> dict[str, StoredTensor]:
        stored = {}
        for name, tensor in self._content.items():
            dtype, shape = tensor.dtype, tuple(tensor.shape)
            if getattr(tensor, "is_meta", False):
                raise UserError(f"The tensor {name} of {self._file} has no values; save the model again.")
            stored[name] = StoredTensor(
                str(dtype).removeprefix("torch."), shape, dtype.itemsize * prod(shape)
            )
        return stored

    def load(self, name: str) -> Tensor:
        tensor = self._content[name]
        if isinstance(tensor, Tensor):
            return tensor.detach()
        assert self._legacy is not None
        return self._legacy.load(tensor)


def _nested_tables(content: Any) -> list[Any]:
    return [content[key] for key in _TABLE_KEYS if key in content] if isinstance(content, dict) else []


def _is_table(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, (Tensor, LegacyTensor))
        for name, tensor in content.items()
    )
