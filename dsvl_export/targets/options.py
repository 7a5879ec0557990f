"""Options of compilers: a leaf module, which compilers and commands import."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from dsvl_export.targets.targets import Target
from runtimes.errors import UserError
from runtimes.preprocess import PreprocessSpec

LATEST = "11.4"
OLDEST = Version("10.3")
DELEGATES = ("xnnpack", "coreml", "vulkan")  # of ExecuTorch


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Options of the backend ``onnxruntime``.

    Args:
        prefill: add a second decoder graph for prompts, with 8-bit weights, if the decoder has
            4-bit weights and quantizes activations per token.
        switchable: add a decoder graph that takes LoRA adapters as inputs; it shares the weights.
            None adds none, unless an ``ExportConfig`` has switchable adapters.
    """

    prefill: bool = True
    switchable: bool | None = None


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of the backends ``tensorrt`` and ``tensorrt_rtx``.

    Args:
        version: version of TensorRT that builds the engines, for example ``10.3``; None selects the
            target's, or the latest.
        capabilities: compute capabilities, for example 89, that TensorRT-RTX builds engines for;
            empty selects the target's, or the compiler's default.
    """

    version: str | None = None
    capabilities: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExecuTorchOptions:
    """Options of the backend ``executorch``.

    Args:
        delegate: runs the encoders: ``xnnpack``, ``coreml`` or ``vulkan``; None selects
            ``xnnpack``.
    """

    delegate: str | None = None


@dataclass(frozen=True)
class CompileOptions:
    """Everything a compiler is told beside the program; each compiler reads what it needs.

    Args:
        target: the device; None leaves it open.
        capacity: tokens of the KV cache, for backends that fix it at compile time.
        preprocessing: of the model's images, for programs that take an image as input.
        onnxruntime: options of ONNX Runtime.
        tensorrt: options of TensorRT and TensorRT-RTX.
        executorch: options of ExecuTorch.
    """

    target: Target | None = None
    capacity: int = 2048
    preprocessing: PreprocessSpec | None = None
    onnxruntime: OnnxRuntimeOptions = OnnxRuntimeOptions()
    tensorrt: TensorRTOptions = TensorRTOptions()
    executorch: ExecuTorchOptions = ExecuTorchOptions()

    def target_name(self, default: str) -> str:
        """Return the target's name, or ``default`` if no target is set."""
        return self.target.name if self.target else default

    def tensorrt_version(self) -> Version:
        """Return the TensorRT version that builds the engines.

        It is the option, the target's, or the latest.

        Raises:
            UserError: the version is malformed or too old.
        """
        supported = self.target.tensorrt if self.target else ()
        text = self.tensorrt.version or next(iter(supported), LATEST)
        try:
            version = Version(text)
        except InvalidVersion as error:
            raise UserError(f"{text!r} is not a version of TensorRT; write it as 10.3.") from error
        oldest = min(map(Version, supported), default=OLDEST)
        if version < oldest:
            where = f" for {self.target.device}" if self.target else ""
            raise UserError(f"TensorRT {text} is too old{where}; the oldest supported version is {oldest}.")
        return version
