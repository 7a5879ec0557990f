"""A checkpoint folder: its config, its settings and its tensors, loaded one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from reference.checkpoint.config_file import parse_config
from reference.checkpoint.file_signature import check_file_signature
from reference.checkpoint.folder_content import (
    ADAPTER_CONFIG,
    has_weights,
    join_names,
    subfolder_hint,
)
from reference.checkpoint.image_processor import read_image_processor
from reference.checkpoint.layouts import (
    EMBEDDING,
    HEAD,
    ParameterSource,
    Shape,
    canonical_names,
    is_skipped,
    is_unused,
    parameter_sources,
)
from reference.checkpoint.lora_adapter import AdapterChoice, base_model
from reference.checkpoint.lora_merge import Adapters
from reference.checkpoint.stored_config import config_of_weights
from reference.checkpoint.streaming import stream_weights
from reference.checkpoint.tensor_files import (
    ADAPTER_FILES,
    FLOAT_DTYPES,
    MERGE_ADAPTER_HINT,
    TensorFiles,
)
from reference.model.config import ModelConfig
from reference.model.constants import materialize_constants
from reference.model.deepseek_vl import DeepSeekVL
from reference.settings import Settings
from reference.tiny import TINY
from runtimes.bundle.files import read_json, sha256_of_files, sha256_of_text
from runtimes.errors import UserError
from runtimes.hub import HubId, download

STREAMING_THRESHOLD = 2 << 30  # bytes of fp32 weights
# Patterns of files to download: a checkpoint's are in its main folder.
SETTINGS_PATTERNS, SUBFOLDERS = ("*.json", "*.jinja"), ("*/*",)
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Files of tokenizers that transformers can convert to a tokenizer.json.
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_ADAPTER_NAMES = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")
_QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv)?|SCB|absmax|quant_map|quant_state\..*)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config, its files and its tensors, loaded on demand.

    ``preprocessor`` has the image processor's settings; None if no file has them. ``choices`` are
    the LoRA adapters that are merged into the weights, in this order. ``origin`` is
    ``ORG/NAME@COMMIT`` if the folder was downloaded from the hub. ``built_in_prompt`` ignores the
    checkpoint's own chat template.
    """

    folder: Path
    config: ModelConfig
    preprocessor: Settings | None
    choices: tuple[AdapterChoice, ...] = ()
    origin: str = ""
    built_in_prompt: bool = False

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self.folder)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.config)

    @property
    def label(self) -> str:
        """The folder, and the adapters that are merged, for messages."""
        adapters = ", ".join(map(str, self.choices))
        return f"{self.folder} with the adapters {adapters}" if adapters else str(self.folder)

    @property
    def name(self) -> str:
        """Name of the folder or hub repository, with the names of the adapters."""
        base = self.origin.partition("@")[0].rpartition("/")[2] or self.folder.name
        return "+".join([base, *(choice.folder.name for choice in self.choices)])

    @cached_property
    def adapters(self) -> Adapters:
        """Adapters that ``load`` merges.

        Raises:
            UserError: one cannot be read, or does not fit this model.
        """
        return Adapters(self.choices, self.config, self._shapes)

    def check(self) -> None:
        """Check that the files hold exactly the config's tensors, as floats of the right shapes.

        Raises:
            UserError: a tensor is missing, unexpected, wrongly shaped, stored twice, or not a
                float (the message names up to ten of each kind), or an adapter does not fit.
        """
        self._refuse_adapted_or_quantized()
        stored = {name: self._files.stored[names[0]] for name, names in self._stored_names.items()}
        expected = {tensor: source.shape for source in self._sources.values() for tensor in source.names}
        duplicates = [
            names for name, names in self._stored_names.items() if name in expected and len(names) > 1
        ]
        problems = {
            "missing": sorted(expected.keys() - stored.keys()),
            "unexpected": sorted(
                self._stored_names[name][0]
                for name in stored.keys() - expected.keys()
                if not is_unused(self.config, name)
            ),
            "wrongly shaped": [
                f"{self._stored_names[name][0]} is {list(stored[name].shape)}, expected {list(shape)}"
                for name, shape in sorted(expected.items())
                if name in stored and stored[name].shape != shape
            ],
            "under two names": [" and ".join(names) for names in duplicates],
        }
        parts = [f"{len(rows)} {label}: {join_names(rows)}" for label, rows in problems.items() if rows]
        if parts:
            empty = any(0 in tensor.shape for tensor in stored.values())
            hint = " DeepSpeed saved empty tensors; collect them with zero_to_fp32.py." if empty else ""
            raise UserError(
                f"The weights in {self.folder} do not match its config: {'; '.join(parts)}.{hint}"
            )
        not_float = [name for name in sorted(expected) if stored[name].dtype not in FLOAT_DTYPES]
        if not_float:
            raise UserError(
                f"{len(not_float)} tensors in {self.folder} are stored as {stored[not_float[0]].dtype}"
                f" (such as {not_float[0]}), expected {', '.join(FLOAT_DTYPES)};"
                " export the unquantized checkpoint."
            )
        self.adapters.check()

    def _refuse_adapted_or_quantized(self) -> None:
        """Raise UserError if tensor names show a LoRA adapter or a quantizer."""
        names = sorted(self._files.stored)
        adapter = [name for name in names if _ADAPTER_NAMES.search(name)]
        if adapter:
            raise UserError(
                f"{len(adapter)} tensors in {self.folder} belong to a LoRA adapter (such as {adapter[0]});"
                f" {MERGE_ADAPTER_HINT}."
            )
        quantized = [name for name in names if _QUANTIZED_NAMES.search(name)]
        if quantized:
            raise UserError(
                f"{len(quantized)} tensors in {self.folder} come from a quantizer (such as {quantized[0]});"
                " export the unquantized checkpoint."
            )

    def skipped_tensors(self) -> dict[str, int]:
        """Return the bytes of each tensor of parts that answers do not need, by its name."""
        stored = self._files.stored
        return {name: stored[name].nbytes for name in sorted(stored) if is_skipped(self.config, name)}

    @cached_property
    def _stored_names(self) -> dict[str, list[str]]:
        """Tensor name as in ``parameter_sources`` → its names in the files."""
        return canonical_names(self.config, self._files.stored)

    @cached_property
    def _sources(self) -> dict[str, ParameterSource]:
        """Sources by parameter; of a tied embedding and head, one may be read from the other."""
        table = parameter_sources(self.config, self._shapes)
        if self.config.tied_head:
            for name, twin in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
                if table[name].names[0] not in self._stored_names:
                    table[name] = table[twin]
        return table

    def _stored(self, parameter: str) -> list[str]:
        """Return the names in the files of the tensors that make up one parameter."""
        return [self._stored_names[name][0] for name in self._sources[parameter].names]

    def load(self, parameter: str) -> Tensor:
        """Load one parameter in the checkpoint's dtype, but float64 as float32.

        The reference computes in float32, and no runtime reads float64. A parameter that an adapter
        changes is float32 as well.

        Args:
            parameter: a name of ``DeepSeekVL.named_parameters()``.
        """
        parts = [self._files.load(name) for name in self._stored(parameter)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        return self.adapters.merge(parameter, tensor.reshape(self._shapes[parameter]))

    def embedding_bytes(self) -> int | None:
        """Return the bytes of the token embedding as ``load`` returns it; None without weights."""
        if not has_weights(self.folder):
            return None
        (name,) = self._stored(EMBEDDING)
        stored = self._files.stored[name]
        if EMBEDDING in self.adapters:
            return 4 * prod(stored.shape)
        return stored.nbytes // 2 if stored.dtype == "float64" else stored.nbytes

    def load_model(
        self,
        streamed: bool | None = None,
        load: Callable[[str], Tensor] | None = None,
        prepare: Callable[[DeepSeekVL], None] = lambda model: None,
    ) -> DeepSeekVL:
        """Load the reference model in fp32, ready to run.

        Args:
            streamed: keep the weights in the files and load those of a module only while it runs,
                so that memory does not grow with the model. None streams models of more than
                ``STREAMING_THRESHOLD`` bytes.
            load: returns a parameter by its name, instead of ``Checkpoint.load``.
            prepare: changes the model, still on the meta device, before it gets its weights.
        """
        load = load or self.load
        with torch.device("meta"):
            model = DeepSeekVL(self.config)
        prepare(model)
        total = sum(4 * parameter.numel() for parameter in model.parameters())
        if total > STREAMING_THRESHOLD if streamed is None else streamed:
            stream_weights(model, load)
        else:
            model = model.to_empty(device="cpu")
            for name, parameter in model.named_parameters():
                parameter.data.copy_(load(name))
        materialize_constants(model)
        return model.eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config, tokenizer, preprocessing and weights; identifies the checkpoint."""
        return self.compute_digest(lambda done, total: None)

    def compute_digest(self, on_step: Callable[[int, int], None]) -> str:
        """Compute ``digest`` with progress; the first call reads all weights.

        Args:
            on_step: called with the number of bytes read so far and in total.
        """
        cached = vars(self)  # where ``cached_property`` stores its value
        if "digest" in cached:
            return str(cached["digest"])
        names = (
            "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
            "chat_template.jinja", "chat_template.json",
        )  # fmt: skip
        settings = [self.folder / name for name in names if (self.folder / name).exists()]
        hashes = sha256_of_files([*settings, *self.tokenizer_files, *self._files.files], on_step)
        lines = [f"{file.name} {hash_}" for file, hash_ in hashes.items()]
        cached["digest"] = sha256_of_text("\n".join([*lines, *self.adapters.identity()]))
        return str(cached["digest"])

    @property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files that a bundle copies, ``tokenizer.json`` first.

        Raises:
            UserError: there is no ``tokenizer.json``.
        """
        if not (self.folder / "tokenizer.json").exists():
            slow = next((name for name in SLOW_TOKENIZER_FILES if (self.folder / name).exists()), None)
            remedy = (
                f"it has {slow}, from which transformers makes one:"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                if slow
                else "download it too"
            )
            raise UserError(f"{self.folder} has no tokenizer.json, which the runtime needs; {remedy}.")
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        return [self.folder / name for name in names if (self.folder / name).exists()]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter; a model on the meta device takes no memory."""
    with torch.device("meta"):
        model = DeepSeekVL(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def resolve_checkpoint(checkpoint: str, weights: bool = True) -> tuple[Path, str]:
    """Find the folder of a checkpoint; a Hugging Face Hub id is downloaded first.

    Args:
        checkpoint: ``tiny``, a local folder, or a hub id, with a revision or without.
        weights: whether to download the weights too, not the settings alone.

    Returns:
        The folder, and ``ORG/NAME@COMMIT`` of a hub id; empty for others.

    Raises:
        UserError: there is no such folder, and it cannot be downloaded.
    """
    if checkpoint == "tiny":
        return TINY, ""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder, ""
    if folder.exists():
        raise UserError(f"{checkpoint} is a file; give the folder that holds config.json.")
    hub_id = HubId.parse(checkpoint)
    if hub_id is None:
        raise UserError(f"The folder {checkpoint} does not exist.")
    snapshot = download(hub_id, [*SETTINGS_PATTERNS, *["*.safetensors"] * weights], SUBFOLDERS)
    if weights and not has_weights(snapshot.folder):
        snapshot = download(hub_id, [*SETTINGS_PATTERNS, "*.bin"], SUBFOLDERS)
    return snapshot.folder, f"{hub_id.repository}@{snapshot.commit}"


def open_checkpoint(
    checkpoint: str,
    weights: bool = True,
    adapters: Sequence[AdapterChoice] = (),
    built_in_prompt: bool = False,
) -> Checkpoint:
    """Open a checkpoint: read its config and check its tensors.

    Args:
        checkpoint: as in ``resolve_checkpoint``.
        weights: False reads the config alone; then the folder needs no weights.
        adapters: LoRA adapters to merge into the weights, in this order.
        built_in_prompt: ignore the checkpoint's own chat template.

    Raises:
        UserError: the checkpoint is missing, incomplete, or of no supported family, or an adapter
            does not fit it.
    """
    folder, origin = resolve_checkpoint(checkpoint, weights)
    file = folder / "config.json"
    adapter = next((name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if not file.exists() and (folder / ADAPTER_CONFIG).exists():
        adapter = ADAPTER_CONFIG
    if adapter and not adapters:
        raise UserError(
            f"{folder} holds a LoRA adapter ({adapter}); export its base model with it: dsvl-export export"
            f" {base_model(folder)} --adapter {folder} --output BUNDLE."
        )
    if not file.exists():
        hint = subfolder_hint(folder)
        raise UserError(f"{folder} has no config.json, so it is not a checkpoint folder{hint}.")
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            check_file_signature(folder / name)
    preprocessor = read_image_processor(folder)
    config = parse_config(read_json(file), str(file), preprocessor)
    if not weights:
        return Checkpoint(folder, config, preprocessor, tuple(adapters), origin, built_in_prompt)
    config = config_of_weights(config, TensorFiles(folder))
    opened = Checkpoint(folder, config, preprocessor, tuple(adapters), origin, built_in_prompt)
    opened.check()
    return opened
