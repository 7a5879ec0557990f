"""Reading of ``tokenizer.json``, and recognition of the tokenizers library's own errors."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from runtimes.errors import UserError, first_line


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer from a file.

    Raises:
        UserError: the file is missing or not a tokenizer.
    """
    if not file.exists():
        raise UserError(f"The tokenizer {file} is missing.")
    try:
        return Tokenizer.from_file(str(file))
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise UserError(f"{file} is not a readable tokenizer: {first_line(error)}.") from error


def is_library_failure(error: BaseException) -> bool:
    """Whether the library raised an error: an Exception, or the type of a Rust panic.

    ``pyo3_runtime.PanicException`` derives from BaseException and cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
