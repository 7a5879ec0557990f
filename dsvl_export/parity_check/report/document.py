"""The JSON document of a parity check; its schema is ``report.schema.json``."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dsvl_export.parity_check.result import ParityResult
from dsvl_export.targets.machine import describe_machine, package_versions
from runtimes.bundle.bundle import Bundle

SCHEMA = Path(__file__).parent / "report.schema.json"
SCHEMA_VERSION = 2  # 1: dsvl-export 0.4


def make_document(bundle: Bundle, result: ParityResult) -> dict[str, Any]:
    """Return the result, the bundle, the machine and the package versions as JSON values."""
    manifest = bundle.manifest
    artifacts = [
        {
            "component": item.component, "backend": item.backend, "precision": item.precision,
            "target": item.target, "dialect": item.dialect, "tools": item.tools,
            "bytes": sum(manifest.files[path].bytes for path in item.files),
            "audit": "passed" if item.audited else "not audited",
        }
        for item in bundle.artifacts(result.backend, result.precision).values()
    ]  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bundle": {
            "folder": str(bundle.folder), "checkpoint": manifest.checkpoint, "model": manifest.model,
            "artifacts": artifacts,
        },
        "machine": describe_machine(),
        "packages": package_versions(),
        **result.to_dict(),
    }  # fmt: skip


def schema() -> dict[str, Any]:
    """Return the JSON schema of the document."""
    content: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return content
