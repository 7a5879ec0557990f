"""The audit of a bundle: artifacts, token table, tokenizer and manifest, against a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.quantized_program import trace_with_plan
from dsvl_export.audit.onnx_file import compare_onnx
from dsvl_export.audit.reconverted import compare_reconverted
from dsvl_export.audit.result import Audit, AuditedPart, Difference
from dsvl_export.audit.values import compare_files, compare_values
from dsvl_export.compilers.onnx.builder import Graph
from dsvl_export.compilers.precisions import bundled_plan, planned_weights
from dsvl_export.compilers.protocol import (
    App,
    BuildsGraphs,
    Compiled,
    Compiler,
    Parts,
    WritesListing,
    compile_parts,
    describe_app,
)
from dsvl_export.compilers.registry import BUILT_IN, load_compiler
from dsvl_export.parity_check.localization import debug_folder
from dsvl_export.targets.options import CompileOptions, ExecuTorchOptions, OnnxRuntimeOptions, TensorRTOptions
from dsvl_export.version import __version__
from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.trace import component_contract
from runtimes.backends.onnxruntime import prefill_file
from runtimes.backends.onnxruntime_adapters import adapted_file
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import TOKENIZER, Artifact
from runtimes.bundle.mixes import Pair
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError

OnBytes = Callable[[str, int], None]  # name of a part, and how many bytes of it were compared
ROWS = 1 << 12  # rows of the token table that are compared at a time


def silent(part: str, count: int) -> None:
    """Report nothing; the default ``on_bytes``."""


def audit(
    bundle: Bundle,
    source: Checkpoint,
    backend: str | None = None,
    precision: str | None = None,
    on_bytes: OnBytes = silent,
) -> Audit:
    """Compare the files of a bundle with what its checkpoint and precision plans give.

    ONNX graphs are lowered again and compared tensor by tensor, as is the token table. Artifacts of
    other converters are converted again and compared byte for byte, which takes the time and memory
    of their export.

    Args:
        bundle: the bundle to audit.
        source: the checkpoint that it was exported from.
        backend: audit the artifacts of this backend only. The shared files are always audited.
        precision: audit the artifacts of this precision only.
        on_bytes: called with the name of a part and how many bytes of it were compared.

    Returns:
        A verdict for each part.

    Raises:
        UserError: the checkpoint is another one, or a plan or its scales are damaged.
    """
    if source.digest != bundle.manifest.checkpoint["sha256"]:
        raise UserError(f"{source.label} is not the checkpoint that {bundle.folder} was exported from.")
    result = Audit(str(source.folder))
    result.parts += [
        _audit_manifest(bundle, source),
        _audit_tokenizer(bundle, source),
        _audit_token_embedding(bundle, source, partial(on_bytes, "token_embedding")),
    ]
    bundle.select(backend, precision)  # raises an error that lists what the bundle has
    groups: dict[Pair, dict[str, Artifact]] = {}  # a mix takes its artifacts from several
    for choice in bundle.matching(backend, precision):
        for component, item in bundle.artifacts(*choice).items():
            groups.setdefault((item.backend, item.precision), {})[component] = item
    for pair, artifacts in groups.items():
        result.parts += _audit_group(bundle, source, pair, list(artifacts.values()), on_bytes)
    return result


def _audit_manifest(bundle: Bundle, source: Checkpoint) -> AuditedPart:
    """Audit the manifest: model config, preprocessing, prompt format and contracts."""
    part = AuditedPart("manifest", (), "compared with the checkpoint's config")
    manifest = bundle.manifest
    pairs: list[tuple[str, Any, Any]] = [
        ("model", manifest.model, source.config.to_dict()),
        ("preprocessing", asdict(manifest.preprocessing), asdict(preprocess_spec(source))),
        ("prompt", manifest.prompt.settings(), prompt_spec(source).settings()),
    ]
    for precision, contracts in manifest.contracts.items():
        plan = bundled_plan(bundle.folder, precision)
        for component, contract in contracts.items():
            expected = component_contract(source.config, component, plan.base, plan.kv_cache)
            pairs.append((f"contracts.{precision}.{component}", asdict(contract), asdict(expected)))
    for name, actual, wanted in pairs:
        _compare_settings(name, actual, wanted, part)
    return part


def _compare_settings(name: str, actual: Any, expected: Any, part: AuditedPart) -> None:
    """Compare nested settings, each named by its path; lists and tuples are equal."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            _compare_settings(f"{name}.{key}", actual.get(key), expected.get(key), part)
        return
    actual, expected = (list(v) if isinstance(v, tuple) else v for v in (actual, expected))
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            _compare_settings(f"{name}.{index}", *pair, part)
        return
    part.values += 1
    if actual != expected:
        part.add(Difference(name, f"is {actual!r}, expected {expected!r}"))


def _audit_tokenizer(bundle: Bundle, source: Checkpoint) -> AuditedPart:
    """Audit the tokenizer files; files that the checkpoint does not have are named."""
    paths = [path for path in bundle.manifest.files if path.startswith("tokenizer/")]
    part = AuditedPart("tokenizer", tuple(paths), "compared byte for byte with the checkpoint's files")
    files = {f"tokenizer/{file.name}": file for file in source.tokenizer_files}
    for path, file in files.items():
        part.bytes += file.stat().st_size
        if path not in paths:
            part.add(Difference(path, "is missing"))
        elif difference := compare_files(path, bundle.path(path), file):
            part.add(difference)
    if others := sorted(set(paths) - files.keys()):
        part.reason = f"{', '.join(others)} is not a file of the checkpoint"
    return part


def _audit_token_embedding(
    bundle: Bundle, source: Checkpoint, on_bytes: Callable[[int], None]
) -> AuditedPart:
    """Audit every row of the token table, those of unused tokens included."""
    path = bundle.manifest.token_embedding
    part = AuditedPart("token_embedding", (path,), "compared with the checkpoint, bit for bit")
    table, expected = TokenEmbedding(bundle.path(path)), source.load("token_embedding.weight")
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[expected.dtype]
    part.tensors, part.values = 1, expected.numel()
    shape = tuple(expected.shape)
    if (table.dtype, table.rows.shape) != (dtype, shape):
        detail = f"is {table.dtype}{list(table.rows.shape)}, expected {dtype}{list(shape)}"
        part.add(Difference("token_embedding", detail))
        return part
    kind = np.dtype("bfloat16" if dtype == "BF16" else table.rows.dtype)
    for start in range(0, shape[0], ROWS):
        rows = expected[start : start + ROWS].contiguous()
        actual = np.ascontiguousarray(table.rows[start : start + ROWS]).view(np.uint8).reshape(-1)
        expected_row = rows.view(torch.uint8).numpy().reshape(-1)
        name = f"token_embedding, rows {start} to {start + len(rows) - 1}"
        difference = compare_values(name, actual, expected_row, kind, tuple(rows.shape))
        if difference:
            part.add(difference)
        on_bytes(len(expected_row))
    return part


def _audit_group(
    bundle: Bundle, source: Checkpoint, pair: Pair, artifacts: Sequence[Artifact], on_bytes: OnBytes
) -> list[AuditedPart]:
    """Audit artifacts of one backend and precision, and the Swift listing if there is one."""
    backend, precision = pair
    stages: dict[str, list[Artifact]] = {}
    for item in artifacts:
        stages.setdefault(item.stage, []).append(item)
    parts = [AuditedPart(stage, items[0].files) for stage, items in stages.items()]
    try:
        compiler = load_compiler(backend)
    except UserError as error:
        for part in parts:
            part.reason = str(error).rstrip(".")
        return parts
    plan, weights = bundled_plan(bundle.folder, precision), planned_weights(source, bundle.folder, precision)
    capacity = next((item.capacity for item in artifacts if item.capacity), bundle.manifest.default_capacity)
    app = describe_app(
        source.config, plan, preprocess_spec(source), prompt_spec(source),
        bundle.path(bundle.manifest.token_embedding), bundle.path(TOKENIZER), capacity,
        bundle.manifest.checkpoint["name"],
    )  # fmt: skip

    def traced_parts(items: Sequence[Artifact]) -> Parts:
        def loading(component: str) -> Callable[[str], torch.Tensor]:
            return lambda parameter: weights.load(f"{component}.{parameter}")

        names = [item.component for item in items]
        return {name: (trace_with_plan(source.config, name, plan), loading(name)) for name in names}

    for part, items in zip(parts, stages.values(), strict=True):
        options, on_part = _options(items[0], app), partial(on_bytes, part.name)
        try:
            audit_artifacts(compiler, bundle, items, traced_parts(items), app, options, part, on_part)
        except UserError as error:
            part.add(Difference(part.name, f"cannot be compared: {error}"))
    if isinstance(compiler, WritesListing) and pair in bundle.choices():
        write = partial(compiler.write_listing, app=app)
        parts.append(_audit_listing(bundle, f"{backend}/{precision}/listing", write))
    return parts


def _options(artifact: Artifact, app: App) -> CompileOptions:
    """Return the options that an artifact was compiled with, as far as they change its content."""
    main, *files = map(Path, artifact.files)
    return CompileOptions(
        capacity=app.capacity,
        preprocessing=app.preprocessing,
        onnxruntime=OnnxRuntimeOptions(prefill_file(main) in files, adapted_file(main) in files),
        tensorrt=TensorRTOptions(artifact.tools.get("for")),
        executorch=ExecuTorchOptions(artifact.dialect if artifact.backend == "executorch" else None),
    )


def audit_artifacts(
    compiler: Compiler,
    bundle: Bundle,
    artifacts: Sequence[Artifact],
    traced: Parts,
    app: App,
    options: CompileOptions,
    part: AuditedPart,
    on_bytes: Callable[[int], None],
) -> None:
    """Compare the artifacts in one folder of a bundle; the result is recorded in ``part``.

    Args:
        compiler: of the backend.
        bundle: the bundle with the artifacts.
        artifacts: the artifacts in the folder.
        traced: traced programs and parameters of the components.
        app: settings that artifacts for apps contain.
        options: what the artifacts were compiled with.
        part: the part of the audit that receives the result.
        on_bytes: called with the number of bytes that were compared.
    """
    first = artifacts[0]
    if isinstance(compiler, BuildsGraphs):
        files = [bundle.path(path) for path in first.files]
        audit_onnx(compiler.graphs(*traced[first.component], options), files, part, on_bytes)
        writer = first.tools.get("dsvl-export", __version__)
        if part.differences and writer != __version__:
            part.differences.clear()
            part.reason = f"it was written by dsvl-export {writer}, this is {__version__}; export it again"
        if first.engine:
            part.reason = f"engines cannot be audited, so {first.engine.file} was not compared"
        return

    def compile_into(folder: Path) -> Compiled:
        return compile_parts(compiler, app, traced, folder, on_bytes, options)

    with debug_folder(bundle) as temporary:
        stage = bundle.path(first.stage)
        strict = first.backend in BUILT_IN
        compare_reconverted(compile_into, Path(temporary), stage, first.tools, part, strict)


def audit_onnx(
    expected: Sequence[Graph], files: Sequence[Path], part: AuditedPart, on_bytes: Callable[[int], None]
) -> None:
    """Compare the ONNX files among ``files``, in order, with the graphs that they must contain."""
    files = [file for file in files if file.suffix == ".onnx"]
    if len(files) != len(expected):
        part.add(Difference(part.name, f"has {len(files)} ONNX files, expected {len(expected)}"))
    for graph, file in zip(expected, files, strict=False):
        compare_onnx(graph, file, part, on_bytes)


def audit_written(
    compiler: Compiler, name: str, compiled: Compiled, parts: Parts, options: CompileOptions
) -> bool:
    """Audit ONNX files that an export has just written; return whether they were audited.

    Other artifacts are not audited here, since they would have to be converted again; engines
    cannot be audited.

    Raises:
        UserError: the files differ from what the checkpoint and the plan give.
    """
    if not isinstance(compiler, BuildsGraphs) or compiled.engine:
        return False
    (traced,) = parts.values()
    part = AuditedPart(name)
    audit_onnx(compiler.graphs(*traced, options), compiled.files, part, lambda count: None)
    if part.differences:
        raise UserError(
            f"The files written into {name} differ from the checkpoint ({part.differences[0]}). Check the"
            " disk and the memory, and run the same command again."
        )
    return part.state == "passed"


def _audit_listing(bundle: Bundle, stage: str, write: Callable[[Path], None]) -> AuditedPart:
    """Audit the Swift listing for apps."""
    paths = tuple(path for path in bundle.manifest.files if path.startswith(f"{stage}/"))
    part = AuditedPart(stage, paths, "written again and compared byte for byte")
    with debug_folder(bundle) as temporary:
        write(Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            path = f"{stage}/{file.name}"
            part.bytes += file.stat().st_size
            if path not in paths:
                part.add(Difference(path, "is missing"))
            elif difference := compare_files(path, bundle.path(path), file):
                part.add(difference)
    return part
