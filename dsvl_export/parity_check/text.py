"""The stage ``text``: prompt format and tokenizer, compared with the checkpoint's files."""

from __future__ import annotations

from itertools import islice

from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.texts import TEXT_GOLDENS, TextGoldens, rerecord_texts, text_differences
from runtimes.text.tokenizer import Tokenizer

STAGE = "text"
MISSING = "the bundle was written by an earlier release and has no text goldens; export it again"
MAX_DIFFERENCES = 3  # in the detail


def bundled_texts(bundle: Bundle) -> TextGoldens | None:
    """Load the recorded text goldens and check their hash; return None if the bundle has none."""
    path = f"goldens/{TEXT_GOLDENS}"
    if path not in bundle.manifest.files:
        return None
    bundle.check([path])
    return TextGoldens.load(bundle.path(path))


def judge_text(tokenizer: Tokenizer, goldens: TextGoldens | None, result: ParityResult) -> None:
    """Fill in the stage ``text``: everything must be equal to the goldens."""
    stage = result.stage(STAGE)
    if goldens is None:
        stage.detail = MISSING
        return
    try:
        actual = rerecord_texts(goldens, tokenizer)
    except UserError as error:
        stage.fail(str(error).rstrip("."))
        return
    differences = list(text_differences(actual, goldens))
    if not differences:
        stage.passed()
        return
    hidden = len(differences) - MAX_DIFFERENCES
    more = f"; and {hidden} more" if hidden > 0 else ""
    stage.fail("; ".join(islice(differences, MAX_DIFFERENCES)) + more)
