"""What the manifest says beside its files, compared with what the reference had and the artifacts are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json
from runtimes.goldens.golden import SETTINGS


def settings_faults(bundle: Bundle, live: str | None) -> Iterator[str]:
    """Values of the manifest's model, preprocessing and token table that are not the reference's.

    The stage ``text`` has the prompt.

    Args:
        live: the checkpoint to take them from; None reads those that were recorded with the goldens, which
            bundles of dsvl-export 0.4 do not have.
    """
    path = f"goldens/{SETTINGS}"
    if live:
        # Deferred: imports torch.
        from reference.checkpoint.checkpoint import open_checkpoint
        from reference.checkpoint.specs import reference_settings

        expected = json.loads(json.dumps(reference_settings(open_checkpoint(live))))
    elif path in bundle.manifest.files:
        bundle.check([path])
        expected = read_json(bundle.path(path))
    else:
        return
    manifest = json.loads(json.dumps(bundle.manifest.to_dict()))
    for name, value in expected.items():
        yield from _differences(name, manifest.get(name), value)


def _differences(name: str, found: Any, expected: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key, value in expected.items():  # a later release may write more keys into the manifest
            yield from _differences(f"{name}.{key}", found.get(key), value)
    elif found != expected or type(found) is not type(expected):
        yield f"the manifest has {name} {found!r}, the reference had {expected!r}"
