"""What a folder holds in place of a checkpoint: subfolders, shards of trainers, other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG = "adapter_config.json"
# Files that may hold a chat template, in the order of transformers.
TEMPLATE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.safetensors|\.bin)")
_OTHER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
# What trainers save beside a model to continue the training.
_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*|random_states_.*)\.\w+")
MAX_SUBFOLDERS = 1000  # that are searched


def join_names(names: Iterable[str], limit: int = 10) -> str:
    """Join the first names with commas and count the rest; control characters are escaped."""
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of weights that can be read."""
    return any(file.name in WEIGHT_FILES or SHARD.fullmatch(file.name) for file in folder.iterdir())


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has a config and weights."""
    return (folder / "config.json").exists() and has_weights(folder)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder has the settings of an adapter."""
    return (folder / ADAPTER_CONFIG).exists()


def subfolder_hint(folder: Path, adapters: bool = False) -> str:
    """Return a clause that names the subfolder to use, such as a trainer's ``checkpoint-500``.

    Args:
        folder: is not what the user meant.
        adapters: whether an adapter is looked for; otherwise a model, or an adapter if there is no
            model.

    Returns:
        the clause, which follows a sentence without its full stop; empty without such a folder.
    """
    found = list(_subfolders(folder))
    models = [] if adapters else list(filter(is_model_folder, found))
    choices = models or list(filter(is_adapter_folder, found))
    if not choices:
        return ""
    kind = "a checkpoint" if models else "a LoRA adapter"
    last = max(choices, key=_natural_order)
    others = f", the last of {len(choices)}" if len(choices) > 1 else ""
    return f"; the folder {last} is {kind}{others}: give that one"


def _subfolders(folder: Path) -> Iterator[Path]:
    """Yield the folders below, two levels deep: ms-swift writes ``v0-DATE/checkpoint-500``."""
    level = [folder]
    count = 0
    for _ in range(2):
        level = [child for parent in level for child in _folders_in(parent)]
        count += len(level)
        if count > MAX_SUBFOLDERS:
            return
        yield from level


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [
            child
            for child in sorted(folder.iterdir())
            if child.is_dir() and os.access(child, os.R_OK | os.X_OK)
        ]
    except OSError:
        return []  # this is only for a hint


def _natural_order(folder: Path) -> list[tuple[int, str]]:
    """Sort numbers in names by their values: ``checkpoint-1000`` after ``checkpoint-500``."""
    parts = re.findall(r"\d+|\D+", str(folder))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def trainer_shards_hint(folder: Path) -> str:
    """Return a clause about weights that a trainer has not yet collected; empty without them."""
    names = [file.name for file in folder.iterdir()]
    if "zero_to_fp32.py" in names or any(re.fullmatch(r"global_step\d+", name) for name in names):
        return "; it has shards of DeepSpeed: collect them with zero_to_fp32.py, which DeepSpeed writes"
    for name in names:
        if re.fullmatch(r"(pytorch_model|model)_fsdp_\d+|.*\.distcp", name):
            part = folder if name.endswith(".distcp") else folder / name
            return f"; it has shards of FSDP: collect them with accelerate merge-weights {part} {folder}"
    return ""


def other_files_hint(folder: Path) -> str:
    """Return a clause about files of weights under other names or in other formats."""
    others = [
        file.name
        for file in sorted(folder.iterdir())
        if file.suffix in _OTHER_SUFFIXES and not _TRAINING_STATE.fullmatch(file.name)
    ]
    if not others:
        return ""
    hint = f"; it has {join_names(others, 5)}, which are not supported"
    if len(others) == 1 and others[0].endswith((".safetensors", ".bin", ".pt", ".pth")):
        name = "model.safetensors" if others[0].endswith(".safetensors") else "pytorch_model.bin"
        hint = f"; it has {others[0]}: if it is the whole model, rename it to {name}"
    return hint
