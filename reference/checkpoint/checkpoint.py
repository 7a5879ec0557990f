"""A checkpoint folder: its config, its settings and its tensors, loaded one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from reference.checkpoint.config_file import parse_config
from reference.checkpoint.file_start import check_start
from reference.checkpoint.image_processor import read_image_processor
from reference.checkpoint.layouts import UNUSED, Shape, Source, canonical_names, sources
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.checkpoint.lora_merge import Adapters
from reference.checkpoint.settings import Settings
from reference.checkpoint.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    MERGE_FIRST,
    WEIGHT_FILES,
    TensorFiles,
    list_names,
)
from reference.model.config import ModelConfig
from reference.model.constants import materialise_constants
from reference.model.deepseek_vl import DeepSeekVL
from reference.tiny import TINY
from runtimes.bundle.files import read_json, sha256_of_files, sha256_of_text, write_json
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command
from runtimes.text.prompt import BOS, EOS, PAD

STREAM_ABOVE = 2 << 30  # bytes of fp32 weights
FLOATS = ("float32", "float16", "bfloat16", "float64")
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_ADAPTER_NAMES = re.compile(r"^base_model\.model\.|(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")
_QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv)?|SCB|absmax|quant_map|quant_state\..*)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A DeepSeek-VL checkpoint folder: its config, its files and its tensors, loaded on demand."""

    folder: Path
    config: ModelConfig
    preprocessor: Settings | None  # of the image processor; None where no file has them
    choices: tuple[AdapterChoice, ...] = ()  # adapters that are merged into the weights

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self.folder)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.config)

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters that ``load`` merges.

        Raises:
            UserError: one cannot be read, or does not fit this model.
        """
        return Adapters.open(self.choices, self.config, self._shapes)

    def check(self) -> None:
        """Every tensor is there, with the right shape and of a floating-point type, and none is unknown.

        Raises:
            UserError: names the missing, unexpected and wrongly shaped tensors, ten of each.
        """
        self._refuse_other_states()
        stored = {name: self._files.stored[names[0]] for name, names in self._stored_names.items()}
        wanted = {tensor: source.shape for source in self._sources.values() for tensor in source.names}
        known = wanted.keys() | ({_head_name(self.config)} if self.config.tied_head else set())
        twice = [names for name, names in self._stored_names.items() if name in known and len(names) > 1]
        problems = {
            "missing": sorted(wanted.keys() - stored.keys()),
            "unexpected": sorted(
                self._stored_names[name][0] for name in stored.keys() - known if not UNUSED.fullmatch(name)
            ),
            "wrongly shaped": [
                f"{self._stored_names[name][0]} is {list(stored[name].shape)}, expected {list(shape)}"
                for name, shape in sorted(wanted.items())
                if name in stored and stored[name].shape != shape
            ],
            "under two names": [" and ".join(names) for names in twice],
        }
        parts = [f"{len(rows)} {label}: {list_names(rows)}" for label, rows in problems.items() if rows]
        if parts:
            raise UserError(f"The weights in {self.folder} do not fit its config: {'; '.join(parts)}.")
        odd = [name for name in sorted(wanted) if stored[name].dtype not in FLOATS]
        if odd:
            raise UserError(
                f"{len(odd)} tensors in {self.folder} are stored as {stored[odd[0]].dtype}"
                f" (such as {odd[0]}), expected {', '.join(FLOATS)}; export the unquantized checkpoint."
            )

    def _refuse_other_states(self) -> None:
        """Weights that belong to an adapter or come from a quantizer, which the names tell."""
        names = sorted(self._files.stored)
        adapter = [name for name in names if _ADAPTER_NAMES.search(name)]
        if adapter:
            raise UserError(
                f"{len(adapter)} tensors in {self.folder} belong to a LoRA adapter (such as {adapter[0]});"
                f" {MERGE_FIRST}."
            )
        quantized = [name for name in names if _QUANTIZED_NAMES.search(name)]
        if quantized:
            raise UserError(
                f"{len(quantized)} tensors in {self.folder} come from a quantizer (such as {quantized[0]});"
                " export the unquantized checkpoint."
            )

    @cached_property
    def _stored_names(self) -> dict[str, list[str]]:
        """Names as in ``sources`` → those in the files."""
        return canonical_names(self.config, self._files.stored)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Sources, with the head read from the embedding where it is tied and not stored."""
        table = sources(self.config, self._shapes)
        if self.config.tied_head and table["decoder.head.weight"].names[0] not in self._stored_names:
            table["decoder.head.weight"] = table["token_embedding.weight"]
        return table

    def _stored(self, parameter: str) -> list[str]:
        """Names in the files of the tensors that make up one parameter."""
        return [self._stored_names[name][0] for name in self._sources[parameter].names]

    def load(self, parameter: str) -> Tensor:
        """One parameter in the checkpoint's dtype, named as in ``DeepSeekVL.named_parameters()``.

        Double precision becomes single: the reference computes in it, and no runtime reads more. What an
        adapter changes is in fp32.
        """
        parts = [self._files.load(name) for name in self._stored(parameter)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        return self.adapters.merge(parameter, tensor.reshape(self._shapes[parameter]))

    def embedding_bytes(self) -> int | None:
        """Of the token table as ``load`` gives it; None where the weights are not there."""
        if not any((self.folder / name).exists() for name in WEIGHT_FILES):
            return None
        (name,) = self._stored("token_embedding.weight")
        stored = self._files.stored[name]
        if "token_embedding.weight" in self.adapters:
            return 4 * prod(stored.shape)
        return stored.nbytes // 2 if stored.dtype == "float64" else stored.nbytes

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
        parts = [f"{file.name} {found}" for file, found in hashes.items()] + self.adapters.identity()
        kept["digest"] = sha256_of_text("\n".join(parts))
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
            f" run: {install_command('huggingface_hub')}."
        ) from error
    try:
        patterns = ["*.json", "*.safetensors", "*.bin"] if weights else ["*.json"]
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except Exception as error:  # network, authorisation and hub errors share no base class
        raise UserError(
            f"There is no folder {checkpoint}, and the hub did not give it: {first_line(error)}."
        ) from error


def open_checkpoint(
    checkpoint: str, weights: bool = True, adapters: Sequence[AdapterChoice] = ()
) -> Checkpoint:
    """The checkpoint named on the command line, its config read and its tensors checked.

    Args:
        weights: False asks for the config alone; there need be no weights then.
        adapters: LoRA adapters to merge into the weights, in this order.

    Raises:
        UserError: it is missing, incomplete or no DeepSeek-VL, or an adapter does not fit it.
    """
    folder = resolve(checkpoint, weights)
    file = folder / "config.json"
    adapter = next((name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if not file.exists() and (folder / ADAPTER_CONFIG).exists():
        adapter = ADAPTER_CONFIG
    if adapter:
        raise UserError(f"{folder} holds a LoRA adapter ({adapter}); {MERGE_FIRST}.")
    if not file.exists():
        raise UserError(f"{folder} has no config.json, so it is no checkpoint folder.")
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            check_start(folder / name)
    preprocessor = read_image_processor(folder)
    config = parse_config(read_json(file), str(file), preprocessor)
    opened = Checkpoint(folder, config, preprocessor, tuple(adapters))
    if weights:
        opened.check()
    opened.adapters  # noqa: B018 - refused here rather than later
    return opened


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
