"""The oldest system that an Apple package has to run on."""

from __future__ import annotations

import re
from collections.abc import Mapping

from runtimes.errors import UserError


def check_deployment(asked: str | None, since: Mapping[str, int], why: str) -> None:
    """Refuse a system that is too old.

    Args:
        asked: as ``iOS18`` or ``macOS15``; None is the oldest that there is.
        since: the oldest version of each system.
        why: what older ones lack.

    Raises:
        UserError: it is too old, or no such system.
    """
    if asked is None:
        return
    found = re.fullmatch(r"([A-Za-z]+)\s*(\d+)(?:\.\d+)*", asked)
    systems = {name.lower(): name for name in since}
    known = " or ".join(f"{name}{number}" for name, number in since.items())
    if found is None or found[1].lower() not in systems:
        raise UserError(f"{asked!r} is no deployment target; write it as {known}.")
    name, version = systems[found[1].lower()], int(found[2])
    if version < since[name]:
        oldest = " and ".join(f"{system} {number}" for system, number in since.items())
        raise UserError(f"{name} {version} lacks {why}; {oldest} are the oldest that have it.")
