"""The stage ``text``: what lies between text and tokens, as the checkpoint's own files say."""

from __future__ import annotations

from itertools import islice

from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.texts import TEXT_GOLDENS, TextGoldens, rerecord_texts, text_differences
from runtimes.text.tokenizer import Tokenizer

STAGE = "text"
MISSING = "the bundle is of an earlier release and has no text goldens; export it again"
SHOWN = 3  # differences in the detail


def bundled_texts(bundle: Bundle) -> TextGoldens | None:
    """The recorded text goldens, checked against their hash; None where the bundle has none."""
    path = f"goldens/{TEXT_GOLDENS}"
    if path not in bundle.manifest.files:
        return None
    bundle.check([path])
    return TextGoldens.load(bundle.path(path))


def judge_text(tokenizer: Tokenizer, goldens: TextGoldens | None, result: ParityResult) -> None:
    """Fill the result's stage ``text``: all must be equal."""
    rung = result.rung(STAGE)
    if goldens is None:
        rung.detail = MISSING
        return
    try:
        found = rerecord_texts(goldens, tokenizer)
    except UserError as error:
        rung.fail(str(error).rstrip("."))
        return
    differences = list(text_differences(found, goldens))
    if not differences:
        rung.passed()
        return
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    rung.fail("; ".join(islice(differences, SHOWN)) + more)
