"""Export DeepSeek-VL and Janus to edge and datacenter runtimes, and prove parity.

``from dsvl_export import Pipeline, export, parity``; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvl_export.version import PACKAGES, __version__

if TYPE_CHECKING:
    from dsvl_export.exporter.config import ExportConfig
    from dsvl_export.exporter.export import export, export_bundle
    from dsvl_export.parity_check import parity
    from runtimes.errors import UserError
    from runtimes.generation.sampling import GenerationOptions
    from runtimes.pipeline import Pipeline
    from runtimes.text.prompt import Message

_HOMES = {
    "ExportConfig": "dsvl_export.exporter.config",
    "export": "dsvl_export.exporter.export",
    "export_bundle": "dsvl_export.exporter.export",
    "parity": "dsvl_export.parity_check",
    "Pipeline": "runtimes.pipeline",
    "Message": "runtimes.text.prompt",
    "GenerationOptions": "runtimes.generation.sampling",
    "UserError": "runtimes.errors",
}

__all__ = [
    "ExportConfig", "GenerationOptions", "Message", "Pipeline", "UserError", "__version__", "export",
    "export_bundle", "parity",
]  # fmt: skip


def _check_own_packages() -> None:
    """Check that ``runtimes``, ``reference`` and ``calibration`` are the ones beside this package.

    Raises:
        ImportError: another folder or file comes first on ``sys.path``. The command line prints the
            sentence and exits with code 2 instead.
    """
    for name in PACKAGES:
        own = Path(__file__).parents[1] / name
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):  # no place to name: importing it says what is wrong
            continue
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.parent == own or origin.parent.resolve() == own.resolve():
            continue
        other = origin.parent if origin.stem == "__init__" else origin
        sentence = (
            f"Python imports {other} in place of the package '{name}' of dsvl-export ({own});"
            " rename it, run from another folder, or take its folder out of PYTHONPATH."
        )
        if _runs_as_command():
            print(f"Error: {sentence}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(sentence, name=name, path=str(other))


def _runs_as_command() -> bool:
    """Return whether this process is ``dsvl-export`` or ``python -m dsvl_export``."""
    program = sys.argv[0] if sys.argv else ""
    # While Python looks for the module of ``-m``, it is the program's name.
    return Path(program).stem == "dsvl-export" or (program == "-m" and "dsvl_export" in sys.orig_argv)


_check_own_packages()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'dsvl_export' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
