"""The stages of a chain on a golden, each fed with the reference's own input, so errors do not add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens import Golden, load_golden, teacher_forced
from runtimes.preprocess import to_pixel_values


@dataclass(frozen=True)
class Goldens:
    """A folder of goldens, their files in order."""

    folder: Path
    files: tuple[Path, ...]

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Goldens:
        """The recorded ones, checked against their hashes.

        Raises:
            UserError: there are none, or they are damaged.
        """
        paths = [path for path in sorted(bundle.manifest.files) if path.startswith("goldens/")]
        names = [path for path in paths if path.endswith(".safetensors")]
        if not names:
            raise UserError(f"The bundle {bundle.folder} has no goldens; export it again with goldens.")
        bundle.check(paths)
        return cls(bundle.path("goldens"), tuple(bundle.path(path) for path in names))

    @classmethod
    def recorded_into(cls, folder: Path) -> Goldens:
        return cls(folder, tuple(sorted(folder.glob("*.safetensors"))))

    def images(self, golden: Golden) -> list[Path]:
        return [self.folder / "images" / name for name in golden.images]

    def load(self, index: int, checkpoint: str) -> Golden:
        """One golden.

        Raises:
            UserError: it cannot be read, holds NaN, or is of another checkpoint than the given SHA-256.
        """
        golden = load_golden(self.files[index])
        if golden.checkpoint != checkpoint:
            raise UserError(
                f"The golden {self.files[index]} was recorded from the checkpoint {golden.checkpoint[:12]},"
                f" not from {checkpoint[:12]}; export the bundle again."
            )
        return golden


@dataclass(frozen=True)
class Stage:
    """One tensor of one rung, as the chain computes it and as the reference did."""

    rung: str
    tensor: str
    found: np.ndarray
    expected: np.ndarray


def stages(chain: Chain, golden: Golden) -> Iterator[Stage]:
    """Vision encoder, adaptor, prefill and teacher-forced logits of one golden."""
    pixels = np.stack([to_pixel_values(square, chain.preprocessing) for square in golden.squares])
    features = chain.encode_pixels(pixels)
    for name, expected in golden.features.items():
        yield Stage("vision_encoder", name, features[name], expected)
    given = {
        item.name: golden.features[item.name].astype(item.dtype) for item in chain.adaptor.contract.inputs
    }
    yield Stage("adaptor", "image_embeds", chain.adapt(given), golden.image_embeds)
    embeds = chain.merge(golden.prompt_tokens, golden.image_embeds)
    logits = chain.prefill(embeds, chain.decoder.new_cache(1, len(embeds)))[None]
    yield Stage("prefill_logits", "logits", logits, golden.logits[:1])
    logits = teacher_forced(chain, embeds, golden.greedy_tokens.tolist())
    yield Stage("teacher_forced_logits", "logits", logits, golden.logits)
