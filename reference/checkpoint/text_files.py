"""The files of a checkpoint that say how its prompts are written."""

from __future__ import annotations

from pathlib import Path

from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.folder_content import TEMPLATE_FILES
from reference.families.family import TextFiles
from reference.settings import Settings
from runtimes.bundle.files import read_bytes, read_json
from runtimes.errors import UserError
from runtimes.text.tokenizer_file import read_tokenizer


def read_text_files(checkpoint: Checkpoint) -> TextFiles:
    """Read the tokenizer, its settings, the processor's settings and the chat template.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    folder = checkpoint.folder

    def settings(name: str) -> Settings:
        file = folder / name
        return Settings(read_json(file, huge_integers=True) if file.exists() else {}, str(file))

    base, template = settings("config.json").values.get("_name_or_path"), find_chat_template(folder)
    return TextFiles(
        name=" ".join(map(str, (checkpoint.origin, base, folder.resolve().name))),
        layout=checkpoint.config.layout,
        image_tokens=checkpoint.config.vision.image_tokens,
        tokenizer=read_tokenizer(checkpoint.tokenizer_files[0]),
        tokenizer_settings=settings("tokenizer_config.json"),
        processor=settings("processor_config.json"),
        chat_template=template[1] if template else None,
    )


def find_chat_template(folder: Path) -> tuple[str, str] | None:
    """Find the template as transformers does; returns the file name and the template."""
    file = folder / TEMPLATE_FILES[0]
    if file.exists():
        try:
            return file.name, read_bytes(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    for name in TEMPLATE_FILES[1:]:
        file = folder / name
        template = read_json(file, huge_integers=True).get("chat_template") if file.exists() else None
        if isinstance(template, list):  # several named templates
            named = (item for item in template if isinstance(item, dict) and item.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, str):
            return name, template
    return None
