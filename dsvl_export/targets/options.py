"""What an export is asked for beyond the precision: a leaf module, which compilers and commands import."""

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
    """What an export is asked for beyond the precision; each compiler takes what concerns it.

    Args:
        target: the device; None leaves it open.
        capacity: tokens of the KV cache, where that is fixed when compiling.
        tensorrt: version of TensorRT that will build or run, as in ``10.3``; None is the target's.
        capabilities: compute capabilities, as in 89, of engines that are built for several; empty is the
            target's, or the compiler's choice.
        deployment: the oldest system to run on, as in ``iOS18``; None is the oldest that the backend has.
        preprocessing: of the model's images, for programs that take an image itself.
        delegate: what ExecuTorch runs the encoders on; None is the compiler's choice.
        prefill: whether a decoder with 4-bit weights and 8-bit activations gets a second graph for prompts.
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
        return self.target.name if self.target else otherwise

    def tensorrt_version(self) -> Version:
        """The version that will build: asked for, the target's, or the latest.

        Raises:
            UserError: it is none, or too old.
        """
        there = self.target.tensorrt if self.target else ()
        text = self.tensorrt or next(iter(there), LATEST)
        try:
            version = Version(text)
        except InvalidVersion as error:
            raise UserError(f"{text!r} is not a version of TensorRT; write it as 10.3.") from error
        oldest = min(map(Version, there), default=OLDEST)
        if version < oldest:
            where = f" for {self.target.device}" if self.target else ""
            raise UserError(f"TensorRT {text} is too old{where}; {oldest} is the oldest that is supported.")
        return version
