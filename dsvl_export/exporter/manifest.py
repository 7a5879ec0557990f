"""The manifest of a bundle, built from the finished stages of its exports."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from dsvl_export.compilers.precisions import bundled_plan, precision_folder
from dsvl_export.exporter.staging import Staging, dependencies
from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.specs import remarks
from reference.trace import TRACED_COMPONENTS, component_contract
from runtimes.backends.capabilities import SwitchesAdapters
from runtimes.backends.registry import load_backend
from runtimes.bundle.files import sha256_of_file
from runtimes.bundle.manifest import Artifact, Manifest, SwitchableAdapter, list_choices
from runtimes.bundle.mixes import Mix

TOKEN_EMBEDDING = "token_embedding/token_embedding.safetensors"
CONFIGS = "configs"  # folder of the configs that a bundle keeps
ADAPTERS = "adapters"  # folder of the switchable adapters


def build_manifest(
    source: Checkpoint,
    staging: Staging,
    capacity: int,
    preprocessing: Any,
    prompt: Any,
    now: Manifest | None,
) -> Manifest:
    """Build the manifest of everything that is finished.

    Args:
        source: the checkpoint.
        staging: the output folder.
        capacity: tokens of the KV cache.
        preprocessing: of the model's images.
        prompt: the model's prompt format.
        now: the manifest of the bundle that is extended, with verdicts that ``parity`` recorded
            meanwhile.
    """
    artifacts, adapters, mixes = (
        complete_artifacts(staging), finished_adapters(staging), finished_mixes(staging),
    )  # fmt: skip
    others = (artifact for artifact in finished_artifacts(staging) if artifact not in artifacts)
    unfinished = {path for artifact in others for path in artifact.files}
    folders = {config_folder(*pair) for pair in list_choices(artifacts, mixes)}
    kept = {adapter.file for adapter in adapters}
    unfinished |= {path for path in staging.files() if path.startswith(f"{ADAPTERS}/") and path not in kept}
    unfinished |= {
        path
        for path in staging.files()
        if path.startswith(f"{CONFIGS}/") and str(PurePosixPath(path).parent) not in folders
    }
    precisions = dict.fromkeys(artifact.precision for artifact in artifacts)
    plans = {name: bundled_plan(staging.folder, name) for name in precisions}
    return Manifest(
        model=source.config.to_dict(),
        checkpoint={
            "name": checkpoint_name(source, staging),
            "sha256": source.digest,
            "layout": source.config.layout,
            **({"origin": source.origin} if source.origin else {}),
            **({"remarks": sentences} if (sentences := remarks(source, prompt)) else {}),
        },
        preprocessing=preprocessing,
        prompt=prompt,
        token_embedding=TOKEN_EMBEDDING,
        default_capacity=capacity,
        contracts={
            precision: {
                component: component_contract(source.config, component, plan.base, plan.kv_cache)
                for component in TRACED_COMPONENTS
            }
            for precision, plan in plans.items()
        },
        artifacts=artifacts,
        files={path: entry for path, entry in staging.files().items() if path not in unfinished},
        parity=_kept_verdicts(staging, now),
        adapters=adapters,
        mixes=mixes,
    )


def checkpoint_name(source: Checkpoint, staging: Staging) -> str:
    """Return the name of the checkpoint's folder at the bundle's first export, for listings."""
    return staging.previous.checkpoint["name"] if staging.previous else source.name


def config_folder(backend: str, precision: str) -> str:
    """Return the folder of the config that a bundle keeps for a backend and precision."""
    return f"{CONFIGS}/{backend}/{precision}"


def plan_hashes(staging: Staging, precision: str) -> dict[str, str]:
    """Return the SHA-256 of a precision's plan and scales, which its artifacts depend on."""
    folder = staging.folder / precision_folder(precision)
    return {file.name: sha256_of_file(file) for file in sorted(folder.glob("*"))}


def finished_artifacts(staging: Staging) -> tuple[Artifact, ...]:
    """Return the finished artifacts whose plan and scales are still the bundle's."""
    files, rows = staging.files(), []
    for result in staging.results():
        for row in result.get("artifacts", [result["artifact"]] if "artifact" in result else []):  # until 0.4
            if dependencies(result) not in ({}, plan_hashes(staging, row["precision"])):
                continue
            if result.get("audited"):  # as a whole, when it was written; hashed since
                row = {**row, "audited": {path: files[path].sha256 for path in row["files"]}}
            rows.append(row)
    return tuple(map(Artifact.from_dict, rows))


def finished_adapters(staging: Staging) -> tuple[SwitchableAdapter, ...]:
    """Return the adapters whose decoder still takes them and has the same plan and scales."""
    decoders = {
        (item.backend, item.precision) for item in complete_artifacts(staging) if takes_adapters(item)
    }
    results = [result for result in staging.results() if "adapter" in result]
    adapters = [
        SwitchableAdapter.from_dict(result["adapter"])
        for result in results
        if result["depends_on"] == plan_hashes(staging, result["adapter"]["precision"])
    ]
    return tuple(item for item in adapters if (item.backend, item.precision) in decoders)


def takes_adapters(artifact: Artifact) -> bool:
    """Return whether an artifact is a decoder that takes adapters."""
    if artifact.component != "decoder":
        return False
    module = load_backend(artifact.backend)
    return isinstance(module, SwitchesAdapters) and module.is_switchable(artifact.files)


def finished_mixes(staging: Staging) -> tuple[Mix, ...]:
    """Return the mixes that have all their artifacts, and whose artifacts still fit each other."""
    finished = {
        (item.component, item.backend, item.precision): item.base == "fp16"
        for item in finished_artifacts(staging)
    }
    mixes = [Mix.from_dict(result["mix"]) for result in staging.results() if "mix" in result]

    def fits(mix: Mix) -> bool:
        in_halves = {finished.get((name, *pair)) for name, pair in mix.components.items()}
        return len(in_halves) == 1 and None not in in_halves

    return tuple(filter(fits, mixes))


def complete_artifacts(staging: Staging) -> tuple[Artifact, ...]:
    """Return the artifacts of mixes, and of backends and precisions that have all components."""
    artifacts, mixes = finished_artifacts(staging), finished_mixes(staging)
    used = {(name, *pair) for mix in mixes for name, pair in mix.components.items()}
    used |= {(name, *pair) for pair in list_choices(artifacts, ()) for name in TRACED_COMPONENTS}
    return tuple(item for item in artifacts if (item.component, item.backend, item.precision) in used)


def earlier_variants(staging: Staging) -> dict[str, dict[str, str]]:
    """Return the precision of each component of what earlier exports made, by precision or mix."""
    artifacts, mixes = finished_artifacts(staging), finished_mixes(staging)
    variants = {pair[1]: dict.fromkeys(TRACED_COMPONENTS, pair[1]) for pair in list_choices(artifacts, ())}
    for mix in mixes:
        variants[mix.name] = {component: precision for component, (_, precision) in mix.components.items()}
    return variants


def _kept_verdicts(staging: Staging, old: Manifest | None) -> dict[str, Any]:
    """Return the parity verdicts of the bundle that is extended whose files have not changed."""
    files = staging.files()
    if old is None:
        return {}
    return {
        pair: verdict
        for pair, verdict in old.parity.items()
        if all(files.get(path) == entry for path, entry in old.judged_files(*pair.split("/", 1)).items())
        and not any(
            path.startswith(f"prefix/{precision}/") and path not in old.files
            for _, precision in old.pairs_of(*pair.split("/", 1))
            for path in files
        )
    }
