"""The settings in the manifest, compared with the reference's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json
from runtimes.goldens.golden import SETTINGS

if TYPE_CHECKING:
    from reference.checkpoint.checkpoint import Checkpoint


def settings_faults(bundle: Bundle, source: Checkpoint | None) -> Iterator[str]:
    """Describe each setting in the manifest that differs from the reference's.

    The stage ``text`` covers the prompt format.

    Args:
        bundle: the bundle whose manifest is judged.
        source: the checkpoint to read the settings from; None reads the settings that were recorded
            with the goldens, which bundles of dsvl-export 0.4 do not have.

    Yields:
        A sentence for each setting that differs.
    """
    path = f"goldens/{SETTINGS}"
    if source:
        from reference.checkpoint.specs import reference_settings  # deferred: imports torch

        expected = json.loads(json.dumps(reference_settings(source)))
    elif path in bundle.manifest.files:
        bundle.check([path])
        expected = read_json(bundle.path(path))
    else:
        return
    manifest = json.loads(json.dumps(bundle.manifest.to_dict()))
    for name, value in expected.items():
        yield from _differences(name, manifest.get(name), value)


def _differences(name: str, actual: Any, expected: Any) -> Iterator[str]:
    """Compare nested settings.

    Keys that only the manifest has, written by a later release, are ignored.
    """
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key, value in expected.items():
            yield from _differences(f"{name}.{key}", actual.get(key), value)
    elif actual != expected or type(actual) is not type(expected):
        yield f"the manifest has {name} {actual!r}, the reference had {expected!r}"
