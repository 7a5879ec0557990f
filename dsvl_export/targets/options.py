"""Options of an export beside the precision; a leaf module, which compilers and commands import."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from dsvl_export.targets.targets import Target
from runtimes.errors import UserError
from runtimes.preprocess import PreprocessSpec

LATEST = "11.4"
OLDEST = Version("10.3")


@dataclass(frozen=True)
class CompileOptions:
    """Options of an export beside the precision; each compiler uses those that it supports.

    Attributes:
        target: the device; None is any device.
        capacity: of the KV cache, in tokens, for formats that fix it when compiling.
        tensorrt: version of TensorRT that builds and runs, such as ``10.3``; None is the target's.
        capabilities: compute capabilities to build engines for, such as 89; empty is the target's,
            or the compiler's choice.
        deployment: oldest operating system to support, such as ``iOS18``; None is the oldest that
            the backend supports.
        preprocessing: of the model's images, for programs that take an image itself.
        delegate: ExecuTorch delegate of the encoders; None is the compiler's choice.
        prefill: add a second graph for prompts to a decoder with 4-bit weights and 8-bit
            activations.
    """

    target: Target | None = None
    capacity: int = 2048
    tensorrt: str | None = None
    capabilities: tuple[int, ...] = ()
    deployment: str | None = None
    preprocessing: PreprocessSpec | None = None
    delegate: str | None = None
    prefill: bool = True

    def target_name(self, otherwise: str) -> str:
        """Return the name of the target, or ``otherwise`` without a target."""
        return self.target.name if self.target else otherwise

    def tensorrt_version(self) -> Version:
        """Return the version of TensorRT: the requested one, the target's, or the latest.

        Raises:
            UserError: it is not a version, or is too old.
        """
        supported = self.target.tensorrt if self.target else ()
        text = self.tensorrt or next(iter(supported), LATEST)
        try:
            version = Version(text)
        except InvalidVersion as error:
            raise UserError(f"{text!r} is not a version of TensorRT; use the form 10.3.") from error
        oldest = min(map(Version, supported), default=OLDEST)
        if version < oldest:
            where = f" for {self.target.device}" if self.target else ""
            raise UserError(f"TensorRT {text} is too old{where}; the oldest supported version is {oldest}.")
        return version
