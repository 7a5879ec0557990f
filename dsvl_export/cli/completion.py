"""Values that the shell completes. Nothing here imports torch, and no function raises an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsvl_export.targets.targets import Target
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.mixes import Pair

Complete = Callable[[typer.Context], list[str]]


def values(*names: str) -> Complete:
    """Complete one of fixed values."""

    def complete(context: typer.Context) -> list[str]:
        return list(names)

    return complete


def complete_targets(context: typer.Context) -> list[str]:
    """Complete a target."""
    from dsvl_export.targets.targets import load_targets

    return list(load_targets())


def complete_backends(context: typer.Context) -> list[str]:
    """Complete a backend: those of ``--target``, or all."""
    from runtimes.backends.registry import backend_names

    target = _target(context)
    return list(target.backends) if target else backend_names()


def complete_precisions(context: typer.Context) -> list[str]:
    """Complete a precision: those of ``--target`` with ``--backend``, or all."""
    from dsvl_export.targets.targets import LISTED_BITS

    target, backend = _target(context), context.params.get("backend") or ""
    if target is None:
        return list(LISTED_BITS)
    precisions = [target.backends[backend]] if backend in target.backends else target.backends.values()
    return list(dict.fromkeys(precision for group in precisions for precision in group))


def bundle_backends(bundle: str = "bundle") -> Complete:
    """Complete a backend of the bundle that an argument names."""

    def complete(context: typer.Context) -> list[str]:
        return list(dict.fromkeys(backend for backend, _ in _choices(context, bundle)))

    return complete


def bundle_precisions(bundle: str = "bundle", option: str = "backend") -> Complete:
    """Complete a precision of the bundle that an argument names, for the backend in ``option``."""

    def complete(context: typer.Context) -> list[str]:
        backend = context.params.get(option)
        pairs = _choices(context, bundle)
        return list(dict.fromkeys(precision for name, precision in pairs if backend in (None, name)))

    return complete


def bundle_adapters(context: typer.Context) -> list[str]:
    """Complete an adapter of the bundle that the argument names."""
    opened = _bundle(context, "bundle")
    return list(dict.fromkeys(item.name for item in opened.manifest.adapters)) if opened else []


def _target(context: typer.Context) -> Target | None:
    """Return the target that the command line names so far."""
    from dsvl_export.targets.targets import find_target
    from runtimes.errors import UserError

    try:
        return find_target(context.params.get("target") or "")
    except UserError:
        return None


def _choices(context: typer.Context, bundle: str) -> list[Pair]:
    """Return the backends and precisions of the bundle that the command line names so far."""
    opened = _bundle(context, bundle)
    return opened.choices() if opened else []


def _bundle(context: typer.Context, bundle: str) -> Bundle | None:
    """Return the bundle that the command line names so far."""
    from runtimes.bundle.bundle import Bundle
    from runtimes.errors import UserError

    # While the value of the last option is missing, the parser leaves all arguments in ``args``.
    names = [param.name for param in context.command.params if param.param_type_name == "argument"]
    folder = context.params.get(bundle) or dict(zip(names, context.args, strict=False)).get(bundle)
    try:
        return Bundle.open(Path(folder)) if folder else None
    except (UserError, OSError):
        return None
