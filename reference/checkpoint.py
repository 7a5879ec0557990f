"""Reading checkpoints: both layouts, one file or shards, tensor by tensor from a memory map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from reference.config import ModelConfig, parse_config
from reference.constants import materialise_constants
from reference.layouts import UNUSED, Shape, Source, sources
from reference.model import DeepSeekVL
from reference.tiny import TINY
from runtimes.errors import UserError, first_line
from runtimes.files import read_json, sha256_of_files, sha256_of_text, write_json
from runtimes.prompt import BOS, EOS, PAD

STREAM_ABOVE = 2 << 30  # bytes of fp32 weights
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class TensorFiles:
    """Named tensors in one or several files, read one at a time.

    Raises:
        UserError: a file is missing, cut short or no tensor file.
    """

    def __init__(self, folder: Path) -> None:
        found = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
        if not found:
            raise UserError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}.")
        main = found[0]
        self._file_of: dict[str, Path] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        if main.suffix == ".json":
            table = read_json(main).get("weight_map")
            if not isinstance(table, dict):
                raise UserError(f"{main} has no weight_map, so its shards cannot be found.")
            self.files = [folder / str(name) for name in dict.fromkeys(map(str, table.values()))]
        else:
            self.files = [main]
        for file in self.files:
            if not file.exists():
                raise UserError(f"The weight shard {file} is missing; download it again.")
            self._file_of |= dict.fromkeys(self._names(file), file)

    def _names(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._pickle(file))
        with _open(file) as handle:
            return list(handle.keys())

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        """Tensors of a ``.bin`` file, memory-mapped; arbitrary pickles are refused."""
        if file not in self._pickled:
            try:
                self._pickled[file] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch.load raises a dozen types on bad files
                raise UserError(
                    f"{file} cannot be read as plain weights (it is damaged or holds code):"
                    f" {first_line(error)}."
                ) from error
            content = self._pickled[file]
            if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
                raise UserError(f"{file} holds no table of tensors, so it is no pytorch_model.bin.")
        return self._pickled[file]

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors, opening each file once."""
        found: dict[str, Shape] = {}
        for file in self.files:
            if file.suffix == ".bin":
                found |= {name: tuple(tensor.shape) for name, tensor in self._pickle(file).items()}
                continue
            with _open(file) as handle:
                found |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
        return found

    def nbytes(self, name: str) -> int:
        """Size of one tensor, without reading it where the format allows that."""
        file = self._file_of[name]
        if file.suffix == ".bin":
            return self._pickle(file)[name].nbytes
        with _open(file) as handle:
            part = handle.get_slice(name)
            one = part[tuple(slice(0, 1) for _ in part.get_shape())]
            return int(one.element_size()) * prod(part.get_shape())

    def load(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file.suffix == ".bin":
            return self._pickle(file)[name]
        with _open(file) as handle:
            return handle.get_tensor(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The weight file {file} is damaged or cut short ({first_line(error)}); download it again."
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A DeepSeek-VL checkpoint folder: its config, its files and its tensors, loaded on demand."""

    folder: Path
    config: ModelConfig
    preprocessor: Mapping[str, Any]  # ``preprocessor_config.json`` as it is; empty without one

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self.folder)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.config)

    def check(self) -> None:
        """Every tensor is there, with the right shape, and none is unknown.

        Raises:
            UserError: lists all missing, unexpected and wrongly shaped tensors.
        """
        shapes = self._files.shapes()
        wanted = {tensor: source.shape for source in self._sources.values() for tensor in source.names}
        missing = sorted(wanted.keys() - shapes.keys())
        known = wanted.keys() | ({_head_name(self.config)} if self.config.tied_head else set())
        unexpected = sorted(name for name in shapes.keys() - known if not UNUSED.fullmatch(name))
        wrong = [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in sorted(wanted.items())
            if name in shapes and shapes[name] != shape
        ]
        problems = [
            f"{len(rows)} {label}: {', '.join(rows)}"
            for label, rows in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
            if rows
        ]
        if problems:
            raise UserError(f"The weights in {self.folder} do not fit its config: {'; '.join(problems)}.")

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Sources, with the head read from the embedding where it is tied and not stored."""
        table = sources(self.config, self._shapes)
        if self.config.tied_head and table["decoder.head.weight"].names[0] not in self._files.names:
            table["decoder.head.weight"] = table["token_embedding.weight"]
        return table

    def load(self, parameter: str) -> Tensor:
        """One parameter in the checkpoint's dtype, named as in ``DeepSeekVL.named_parameters()``."""
        source = self._sources[parameter]
        parts = [self._files.load(name) for name in source.names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.reshape(self._shapes[parameter])

    def embedding_bytes(self) -> int | None:
        """Of the token table as it is stored; None where the weights are not there."""
        if not any((self.folder / name).exists() for name in WEIGHT_FILES):
            return None
        (name,) = self._sources["token_embedding.weight"].names
        return self._files.nbytes(name)

    def model(
        self,
        streamed: bool | None = None,
        load: Callable[[str], Tensor] | None = None,
        prepare: Callable[[DeepSeekVL], None] = lambda model: None,
    ) -> DeepSeekVL:
        """The reference model in fp32 with these weights, for computing.

        Args:
            streamed: keep the weights in the files and load each module's only while it runs, so that
                memory does not grow with the model; None does so above ``STREAM_ABOVE`` bytes.
            load: gives a parameter in the place of ``Checkpoint.load``.
            prepare: changes the model, still on the meta device, before it gets its weights.
        """
        load = load or self.load
        with torch.device("meta"):
            model = DeepSeekVL(self.config)
        prepare(model)
        total = sum(4 * parameter.numel() for parameter in model.parameters())
        if total > STREAM_ABOVE if streamed is None else streamed:
            _stream_into(model, load)
        else:
            model = model.to_empty(device="cpu")
            for name, parameter in model.named_parameters():
                parameter.data.copy_(load(name))
        materialise_constants(model)
        return model.eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config, tokenizer, preprocessing and weights: the checkpoint's identity."""
        return self.identify(lambda done, total: None)

    def identify(self, on_step: Callable[[int, int], None]) -> str:
        """``digest``; where it is not known yet, all weights are read.

        Args:
            on_step: called with the bytes that are read, and all.
        """
        kept = vars(self)  # where the property keeps it
        if "digest" in kept:
            return str(kept["digest"])
        names = (
            "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
        )  # fmt: skip
        settings = [self.folder / name for name in names if (self.folder / name).exists()]
        hashes = sha256_of_files([*settings, *self.tokenizer_files, *self._files.files], on_step)
        kept["digest"] = sha256_of_text("\n".join(f"{file.name} {found}" for file, found in hashes.items()))
        return str(kept["digest"])

    @property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files to carry into a bundle; ``tokenizer.json`` is the one that is needed."""
        if not (self.folder / "tokenizer.json").exists():
            raise UserError(f"{self.folder} has no tokenizer.json, which the runtime needs.")
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        return [self.folder / name for name in names if (self.folder / name).exists()]


def _stream_into(model: DeepSeekVL, load: Callable[[str], Tensor]) -> None:
    """Hooks that give a module its own parameters before it runs and take them away after.

    Their memory serves the next module of the same shapes: fresh memory takes longer than the weights.
    """
    spare: dict[Shape, list[Tensor]] = {}

    def attach(module: nn.Module, prefix: str) -> None:
        empty = dict(module.named_parameters(recurse=False))

        def fill(module: nn.Module, args: Any) -> None:
            for name, parameter in empty.items():
                free = spare.get(tuple(parameter.shape))
                with torch.inference_mode(False):  # else they could serve in that mode alone
                    value = free.pop() if free else torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(value.copy_(load(f"{prefix}{name}")), requires_grad=False))

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            for name, parameter in empty.items():
                filled = getattr(module, name)
                if filled is not parameter:  # as it is where loading failed
                    spare.setdefault(tuple(parameter.shape), []).append(filled.data)
                    setattr(module, name, parameter)

        if empty:
            module.register_forward_pre_hook(fill)
            module.register_forward_hook(drop, always_call=True)

    for path, module in model.named_modules():
        attach(module, f"{path}." if path else "")


def _head_name(config: ModelConfig) -> str:
    return "lm_head.weight" if config.layout == "transformers" else "language_model.lm_head.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all parameters, from a model on the meta device (no memory)."""
    with torch.device("meta"):
        model = DeepSeekVL(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def resolve(checkpoint: str, weights: bool = True) -> Path:
    """Folder of ``tiny``, a local folder, or a hub id (downloaded through ``huggingface_hub``).

    Args:
        weights: whether a download needs more than the settings.

    Raises:
        UserError: there is no such folder and no way to fetch it.
    """
    if checkpoint == "tiny":
        return TINY
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{checkpoint} is a file; give the folder that holds config.json.")
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {checkpoint}.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"There is no folder {checkpoint}; to download it as a hub id,"
            " install huggingface_hub (pip install huggingface_hub)."
        ) from error
    try:
        patterns = ["*.json", "*.safetensors", "*.bin"] if weights else ["*.json"]
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except Exception as error:  # network, authorisation and hub errors share no base class
        raise UserError(
            f"There is no folder {checkpoint}, and the hub did not give it: {first_line(error)}."
        ) from error


def open_checkpoint(checkpoint: str, weights: bool = True) -> Checkpoint:
    """The checkpoint named on the command line, its config read and its tensors checked.

    Args:
        weights: False asks for the config alone; there need be no weights then.

    Raises:
        UserError: it is missing, incomplete or no DeepSeek-VL.
    """
    folder = resolve(checkpoint, weights)
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} has no config.json, so it is no checkpoint folder.")
    preprocessor = _read_preprocessor(folder)
    config = parse_config(read_json(file), str(file), preprocessor)
    opened = Checkpoint(folder, config, preprocessor)
    if weights:
        opened.check()
    return opened


def _read_preprocessor(folder: Path) -> dict[str, Any]:
    """Settings of the image processor; transformers 5 keeps them inside ``processor_config.json``."""
    own, combined = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.exists():
        return read_json(own)
    inner = read_json(combined).get("image_processor", {}) if combined.exists() else {}
    if not isinstance(inner, dict):
        raise UserError(f"{combined} has an image_processor that is no object.")
    return inner


def write_original(
    model: DeepSeekVL, raw_config: Mapping[str, Any], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a model in the original layout, float16, with its tokenizer and preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    table = sources(model.config, parameter_shapes(model.config))
    state = {
        table[name].names[0]: parameter.detach().to(torch.float16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", raw_config)
    write_json(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS,
         "pad_token": PAD, "tokenizer_class": "LlamaTokenizer"},
    )  # fmt: skip
    norm = model.config.vision.high_norm or model.config.vision.low_norm
    write_json(
        folder / "preprocessor_config.json",
        {"image_size": model.config.vision.image_size, "min_size": 14, "do_normalize": False,
         "image_mean": list(norm.mean) if norm else None, "image_std": list(norm.std) if norm else None,
         "rescale_factor": 1 / 255, "image_processor_type": "VLMImageProcessor"},
    )  # fmt: skip
