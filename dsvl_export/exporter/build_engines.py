"""TensorRT engines for this machine's GPU, built from the ONNX files of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from packaging.version import Version

from dsvl_export.compilers.engines.build import EngineSettings, build_engine
from dsvl_export.exporter.staging import Staging, dependencies
from dsvl_export.lint import Release, refuse
from runtimes.backends.engines.cuda import Cuda, CudaError, Gpu, import_cuda
from runtimes.backends.engines.library import import_library
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Artifact, Engine, Manifest
from runtimes.errors import UserError
from runtimes.goldens.golden import golden_token_count, is_golden

BACKEND = "tensorrt"
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Device:
    """The TensorRT library that builds engines, and the GPU that it builds them for."""

    trt: ModuleType
    gpu: Gpu

    @classmethod
    def here(cls) -> Device:
        """Return this machine's library and GPU.

        Raises:
            UserError: TensorRT, cuda-python or a GPU is missing.
        """
        trt = import_library(BACKEND)
        try:
            return cls(trt, Cuda(import_cuda()).gpu())
        except CudaError as error:
            reason = str(error).rstrip(".")
            raise UserError(
                f"Engines are built on the GPU that runs them, and none can be used here ({reason})."
            ) from error

    @property
    def version(self) -> Version:
        """Version of the library."""
        return Version(self.trt.__version__)


def build_engines(
    folder: Path,
    settings: EngineSettings | None = None,
    precision: str | None = None,
    device: Device | None = None,
    on_step: OnStep = lambda name, done, total: None,
) -> list[Artifact]:
    """Build the engine of every ``tensorrt`` artifact of a bundle, and add it to the bundle.

    Engines that fit this machine and the settings are kept, so an interrupted build resumes.

    Args:
        folder: of the bundle.
        settings: of the engines; None uses the bundle's capacity.
        precision: one of the bundle's; None builds all.
        device: builds the engines; None selects this machine.
        on_step: is called with the artifact's name, the number of finished artifacts, and of all.

    Returns:
        The artifacts with their engines.

    Raises:
        UserError: the bundle has no ONNX for TensorRT or for this version, TensorRT cannot build
            it, or an export into the bundle was interrupted.
    """
    device = device or Device.here()
    staging, built = Staging(folder), []
    try:
        bundle = staging.bundle()
        staging.open()
        engines = {item.engine.file for item in bundle.manifest.artifacts if item.engine}
        staging.refuse_unfinished_export(bundle, engines.__contains__)
        artifacts = _artifacts(bundle, precision, device.version)
        settings = settings or EngineSettings(bundle.manifest.default_capacity)
        longest = int(bundle.manifest.model["decoder"]["max_positions"])
        if settings.capacity > longest:
            raise UserError(
                f"The capacity must lie between 1 and the model's {longest}, got {settings.capacity}."
            )
        for index, item in enumerate(artifacts):
            on_step(f"{item.precision}/{item.component}", index, len(artifacts))
            built.append(_build(bundle, staging, item, settings, device))
        on_step("done", len(artifacts), len(artifacts))
    except OSError as error:
        raise UserError(
            f"The build stopped: {error.strerror or error} ({folder}); fix this and run the same command"
            " again; the build resumes."
        ) from error
    finally:
        staging.close()
    return built


def _artifacts(bundle: Bundle, precision: str | None, version: Version) -> list[Artifact]:
    """Return the artifacts to build, after a check of their hashes and of the TensorRT version."""
    items = [item for item in bundle.manifest.artifacts if item.backend == BACKEND]
    exact = [item for item in items if precision in (None, item.precision)]
    artifacts = exact or [item for item in items if item.precision == f"{precision}-{item.base}"]
    if not artifacts:
        of_precision = f" in {precision}" if precision else ""
        raise UserError(
            f"The bundle {bundle.folder} holds no ONNX for TensorRT{of_precision};"
            " export it with --backend tensorrt."
        )
    for item in artifacts:
        _check_version(item, version)
    engines = {item.engine.file for item in artifacts if item.engine}
    bundle.check([path for item in artifacts for path in item.files if path not in engines])
    return artifacts


def longest_golden(bundle: Bundle) -> int:
    """Return the tokens that ``parity`` needs in the KV cache; 0 if the bundle has no goldens."""
    files = [path for path in bundle.manifest.files if path.startswith("goldens/") and is_golden(path)]
    return max((golden_token_count(bundle.path(path)) for path in files), default=0)


def _check_version(item: Artifact, version: Version) -> None:
    if Release(version).dialect != item.dialect:
        wanted = item.tools.get("for", "another version")
        raise UserError(
            f"The {item.component} in {item.precision} was exported for TensorRT {wanted}, but this machine"
            f" has {version}; export it again with --tensorrt {version.major}.{version.minor}."
        )


def _build(
    bundle: Bundle, staging: Staging, item: Artifact, settings: EngineSettings, device: Device
) -> Artifact:
    file = bundle.path(item.files[0])
    sm = settings.compute_capabilities or (device.gpu.sm,)
    if item.component != "vision_encoder":
        settings = replace(settings, dla_core=None)
    engine = Engine(
        file=f"{item.stage}/{item.component}.engine",
        sm=sm,
        gpu=device.gpu.name,
        driver=device.gpu.driver,
        platform=device.gpu.platform,
        tensorrt=device.trt.__version__,
        capacity=settings.capacity,
        max_batch=settings.max_batch,
        options=settings.options,
    )
    # The driver may change under an engine.
    current = replace(item.engine, driver=engine.driver) if item.engine else None
    if current == engine and not bundle.problems([engine.file]):
        return item
    refuse(file, Release(device.version, device.gpu.sm))
    contract = bundle.manifest.contracts[item.precision][item.component]
    temporary = staging.work / Path(engine.file).name
    try:
        build_engine(device.trt, file, contract, settings, temporary)
        new = replace(item, engine=engine, files=tuple(dict.fromkeys((*item.files, engine.file))))
        stage = item.stage
        depends = dependencies(staging.result(stage) or {})
        staging.attach(stage, temporary, {"artifacts": [asdict(new)], "depends_on": depends})
    finally:
        temporary.unlink(missing_ok=True)
    _publish(bundle, staging, item, new)
    return new


def _publish(bundle: Bundle, staging: Staging, old: Artifact, new: Artifact) -> None:
    """Write the manifest with an artifact replaced, and without the old one's parity verdict."""
    replaced = (old.component, old.backend, old.precision)
    entry = staging.files()[new.files[-1]]

    def make(now: Manifest | None) -> Manifest:
        manifest = now or bundle.manifest
        artifacts = tuple(
            new if (item.component, item.backend, item.precision) == replaced else item
            for item in manifest.artifacts
        )
        pair = (new.backend, new.precision)
        parity = {
            name: verdict
            for name, verdict in manifest.parity.items()
            if pair not in manifest.pairs_of(*name.split("/", 1))
        }
        files = {**manifest.files, new.files[-1]: entry}
        return replace(manifest, artifacts=artifacts, files=files, parity=parity)

    staging.finish(make)
