"""The files of a checkpoint that say how its prompts are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.folder_content import TEMPLATE_FILES
from reference.families.family import TextFiles
from reference.settings import Settings
from runtimes.bundle.files import read_bytes, read_json
from runtimes.errors import UserError
from runtimes.text.tokenizer_file import read_tokenizer

BUILT_IN_HINT = "use the option --chat-template built-in for the built-in prompt"


def read_text_files(checkpoint: Checkpoint) -> TextFiles:
    """Read the tokenizer, its settings, the processor's settings and the chat template.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    folder = checkpoint.folder

    def settings(name: str) -> Settings:
        file = folder / name
        return Settings(read_json(file, huge_integers=True) if file.exists() else {}, str(file))

    base = settings("config.json").values.get("_name_or_path")
    template = find_chat_template(folder, checkpoint.built_in_prompt)
    return TextFiles(
        name=" ".join(map(str, (checkpoint.origin, base, folder.resolve().name))),
        layout=checkpoint.config.layout,
        image_tokens=checkpoint.config.vision.image_tokens,
        tokenizer=read_tokenizer(checkpoint.tokenizer_files[0]),
        tokenizer_settings=settings("tokenizer_config.json"),
        processor=settings("processor_config.json"),
        chat_template=template[1] if template else None,
    )


def find_chat_template(folder: Path, optional: bool = False) -> tuple[str, str] | None:
    """Find the template as transformers does; returns the file name and the template.

    Args:
        folder: of a checkpoint or an adapter.
        optional: return None where an error would be raised because no template is the default.

    Raises:
        UserError: a file cannot be read, or has several templates and none is named ``default``.
    """
    file = folder / TEMPLATE_FILES[0]
    if file.exists():
        try:
            return file.name, read_bytes(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    for name in TEMPLATE_FILES[1:]:
        file = folder / name
        template = read_json(file, huge_integers=True).get("chat_template") if file.exists() else None
        if not template:
            continue
        if isinstance(template, str):
            return name, template
        if isinstance(default := _named_templates(template).get("default"), str):
            return name, default
        if not optional:
            raise UserError(
                f"The chat_template in {file} must be a text, or have an entry named 'default'; name an entry"
                f" so, or {BUILT_IN_HINT}."
            )
    return None


def _named_templates(templates: Any) -> dict[Any, Any]:
    """Return several templates by their names, from a mapping or from a list of entries."""
    if isinstance(templates, dict):
        return templates
    entries = templates if isinstance(templates, list) else []
    return {str(item.get("name")): item.get("template") for item in entries if isinstance(item, dict)}
