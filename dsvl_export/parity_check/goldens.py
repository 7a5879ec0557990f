"""The goldens that a bundle is compared with: a folder of recorded inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtimes.bundle.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import (
    GREEDY_TOKENS,
    Golden,
    golden_token_count,
    is_golden,
    load_golden,
)

IMAGES = "goldens/images/"


@dataclass(frozen=True)
class Goldens:
    """A folder of goldens: their files in order, and the number of each.

    ``listed`` are the names of the images in the manifest; None allows every image.
    """

    folder: Path
    files: tuple[Path, ...]
    numbers: tuple[int, ...]
    listed: frozenset[str] | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Goldens:
        """Return the goldens of a bundle, after checking their hashes.

        Raises:
            UserError: the bundle has no goldens, or they are damaged.
        """
        paths = [path for path in sorted(bundle.manifest.files) if path.startswith("goldens/")]
        names = [path for path in paths if is_golden(path)]
        if not names:
            raise UserError(f"The bundle {bundle.folder} has no goldens; export it again with goldens.")
        bundle.check(paths)
        files = tuple(map(bundle.path, names))
        listed = frozenset(path.removeprefix(IMAGES) for path in paths if path.startswith(IMAGES))
        return cls(bundle.path("goldens"), files, tuple(range(len(names))), listed)

    @classmethod
    def recorded_into(cls, folder: Path) -> Goldens:
        """Return the goldens that were just recorded into a folder."""
        files = tuple(sorted(file for file in folder.glob("*.safetensors") if is_golden(file.name)))
        return cls(folder, files, tuple(range(len(files))))

    def within(self, longest: int | None) -> Goldens:
        """Return the goldens that fit into a KV cache of ``longest`` tokens; None is no limit.

        Raises:
            UserError: no golden fits.
        """
        sizes = [golden_token_count(file) for file in self.files]
        indices = [index for index, size in enumerate(sizes) if longest is None or size <= longest]
        if not indices:
            raise UserError(
                f"No golden fits into the decoder's KV cache of {longest} tokens; the shortest needs"
                f" {min(sizes)}. Export again with at least that --capacity."
            )
        numbers = tuple(self.numbers[index] for index in indices)
        return replace(self, files=tuple(self.files[index] for index in indices), numbers=numbers)

    def images(self, golden: Golden) -> list[Path]:
        """Return the image files of a golden."""
        return [self.folder / "images" / name for name in golden.images]

    def load(self, index: int, checkpoint: str) -> Golden:
        """Load one golden.

        Raises:
            UserError: the file cannot be read, holds NaN, or was recorded from another checkpoint
                than the one with the SHA-256 ``checkpoint``.
        """
        golden = load_golden(self.files[index])
        if golden.checkpoint != checkpoint:
            raise UserError(
                f"The golden {self.files[index]} was recorded from the checkpoint {golden.checkpoint[:12]},"
                f" not from {checkpoint[:12]}; export the bundle again."
            )
        if self.listed is not None and not self.listed.issuperset(golden.images):
            raise UserError(f"The golden {self.files[index]} names an image that the manifest does not list.")
        return golden

    def check_fits(self, index: int, golden: Golden, chain: Chain) -> None:
        """Check that a golden has the shapes of the contracts.

        Raises:
            UserError: it has other shapes.
        """
        images, tokens = len(golden.images), len(golden.prompt_tokens)
        side = chain.preprocessing.image_size
        outputs = {spec.name: spec for spec in chain.vision_encoder.contract.outputs}
        outputs = {name: outputs[name] for name in golden.features.keys() & outputs.keys()}
        inputs = {spec.name for spec in chain.adaptor.contract.inputs}
        logits, embeds = chain.decoder.contract.outputs[0], chain.decoder.contract.inputs[0]
        vocabulary = int(logits.shape[-1])
        spec = chain.tokenizer.spec
        ids = np.concatenate([golden.prompt_tokens, golden.greedy_tokens])
        fits = (
            images > 0
            and all(isinstance(name, str) for name in golden.images)
            and golden.squares.shape == (images, side, side, 3)
            and golden.squares.dtype == np.uint8
            and golden.features.keys() == inputs == outputs.keys()
            and all(
                golden.features[name].shape == (images, *item.shape[1:]) for name, item in outputs.items()
            )
            and golden.image_embeds.shape == (images, spec.image_tokens, embeds.shape[-1])
            and golden.prompt_tokens.shape == (tokens,)
            and int((golden.prompt_tokens == spec.image_token_id).sum()) == images * spec.image_tokens
            and golden.greedy_tokens.shape == (GREEDY_TOKENS,)
            and golden.logits.shape == (GREEDY_TOKENS, vocabulary)
            and 0 <= ids.min() <= ids.max() < vocabulary
        )
        if not fits:
            raise UserError(
                f"The golden {self.files[index]} does not fit the bundle's contracts; export it again."
            )
