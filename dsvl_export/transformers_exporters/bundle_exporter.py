"""Export a model of transformers into a bundle, and call the bundle like the model.

``register()`` adds one format per backend, such as ``dsvl-onnxruntime``, to the exporters of
transformers 5.23 or later. Nothing else imports this module.

A format of transformers exports a model in memory; ours writes it as a checkpoint, exports that
into a bundle, and gives the bundle as the program. The runner calls the bundle's components like
the model: token ids and pixels in, logits out. To generate, open the bundle with
``Pipeline.open(exported.program)``, which keeps the KV cache.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.exporters import HfExporter, register_backend
from transformers.exporters.base import ExportedModel
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import ExportMetadata, record_output_structure
from transformers.exporters.runners.base import ModelRunner

from dsvl_export.compilers.registry import compiler_names
from dsvl_export.exporter.export import export
from dsvl_export.version import __version__
from reference.checkpoint.checkpoint import SETTINGS_FILES, resolve_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline

PREFIX = "dsvl-"  # of the formats' names
INPUTS = ("input_ids", "attention_mask", "pixel_values", "high_res_pixel_values")  # of a runner
WRITTEN_BY_MODEL = ("config.json", "generation_config.json")  # by save_pretrained


@dataclass
class BundleConfig(ExportConfigMixin):
    """What a bundle is exported with.

    Args:
        export_format: ``dsvl-`` and the backend.
        processor: folder or hub id with the tokenizer and the image processor's settings; None is
            the one that the model was loaded from.
        precision: name, recipe or YAML file of a precision; None is the backend's first.
        target: a device of ``targets``.
        capacity: tokens of the KV cache.
        goldens: record outputs of the PyTorch reference for ``parity``.
        quantizer: not used; a precision says how weights are quantized.
    """

    export_format: str
    processor: str | None = None
    precision: str | None = None
    target: str | None = None
    capacity: int | None = None
    goldens: bool = False
    quantizer: None = None


class BundleExporter(HfExporter):
    """Exports a model into a bundle; a subclass for each backend has its ``export_format``."""

    config_class = BundleConfig
    program_suffix = ".bundle"

    def export_program(
        self, model: Any, sample_inputs: Any, config: ExportConfigMixin
    ) -> tuple[Bundle, ExportMetadata]:
        """Export a model into a bundle in a temporary folder, which is removed with the bundle.

        Args:
            model: a model of transformers of a supported family.
            sample_inputs: arguments of its forward pass; they are recorded, not traced.
            config: a ``BundleConfig``.

        Raises:
            UserError: there is no tokenizer, or the export fails.
        """
        assert isinstance(config, BundleConfig)
        processor = config.processor or getattr(model, "name_or_path", "")
        if not processor:
            raise UserError("The model has no folder with its tokenizer; give one as processor.")
        settings, _ = resolve_checkpoint(str(processor), weights=False)
        folder = Path(tempfile.mkdtemp(prefix="dsvl-export-"))
        try:
            checkpoint = folder / "checkpoint"
            model.save_pretrained(checkpoint)
            for name in (*SETTINGS_FILES, "chat_template.jinja", "chat_template.json"):
                if name not in WRITTEN_BY_MODEL and (settings / name).exists():
                    shutil.copyfile(settings / name, checkpoint / name)
            bundle = export(
                checkpoint,
                folder / "bundle",
                str(self.export_format).removeprefix(PREFIX),
                precisions=(config.precision,) if config.precision else (),
                goldens=config.goldens,
                target=config.target,
                capacity=config.capacity,
            )
            shutil.rmtree(checkpoint)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(bundle, shutil.rmtree, folder, ignore_errors=True)
        return bundle, _describe(model, sample_inputs)

    def export_for_generation(
        self, model: Any, sample_inputs: Any, config: Any, **options: Any
    ) -> ExportedModel:
        """Export as ``export`` does: a bundle has all components, and generates by itself."""
        return self.export(model, sample_inputs, config)

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        """Copy a bundle to a folder."""
        shutil.copytree(program.folder, path)

    @classmethod
    def load_program(cls, path: str | Path) -> Bundle:
        """Open a bundle."""
        return Bundle.open(path)

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """Return the file that every bundle has; ``dsvl-export push`` publishes a whole bundle."""
        return [f"{filename}/{MANIFEST}"]


class BundleRunner(ModelRunner):
    """Runs the components of a bundle like the forward pass of the model; ``pipeline`` answers."""

    def __init__(
        self, metadata: ExportMetadata, pipeline: Pipeline, vision: dict[str, Any], device: str
    ) -> None:
        """Use an open pipeline.

        Args:
            metadata: of the export.
            pipeline: the bundle's first precision.
            vision: the manifest's sizes of the vision encoder.
            device: of the outputs.
        """
        super().__init__(metadata)
        self.pipeline, self._vision, self._device = pipeline, vision, torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where the outputs are."""
        return self._device

    @classmethod
    def from_program(cls, program: Bundle, metadata: ExportMetadata, device: Any = None) -> BundleRunner:
        """Open a bundle; None is the backend's default device."""
        name = torch.device(device).type if device is not None else None
        pipeline = Pipeline.open(program, device=name)
        return cls(metadata, pipeline, program.manifest.model["vision"], "cpu")

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the logits of all positions.

        Args:
            share_inputs: has no effect, as inputs are always copied.
            share_outputs: has no effect either.
            **kwargs: of the model's forward pass: ``input_ids [B, S]`` with images expanded;
                ``pixel_values [N, 3, H, W]`` of all images as the processor of transformers gives
                them; ``high_res_pixel_values`` of the hybrid model, which makes the small images
                from these; ``attention_mask`` of ones, as a bundle takes no padding.

        Returns:
            the model's output with ``logits [B, S, V]``.

        Raises:
            UserError: an argument is not supported.
        """
        unknown = [name for name, value in kwargs.items() if value is not None and name not in INPUTS]
        mask = kwargs.get("attention_mask")
        if unknown or (mask is not None and not bool(mask.all())):
            raise UserError(
                f"A bundle takes no {', '.join(unknown) or 'padding (attention_mask has zeros)'} as input."
            )
        input_ids = kwargs["input_ids"]
        images = self._embed_images(kwargs.get("pixel_values"), kwargs.get("high_res_pixel_values"))
        rows, used = [], 0
        for tokens in input_ids.numpy(force=True).astype(np.int64):
            slots = int((tokens == self.pipeline.chain.tokenizer.spec.image_token_id).sum())
            count = slots // max(1, images.shape[1])
            rows.append(self._logits(tokens, images[used : used + count]))
            used += count
        return self.unflatten([torch.from_numpy(np.stack(rows))])

    def _embed_images(self, pixels: Tensor | None, high: Tensor | None) -> np.ndarray:
        """Return the embeddings ``[N, T, D]`` of images in the processor's form."""
        chain, norm = self.pipeline.chain, self._vision["high_norm"]
        if high is not None:
            pixels = high.cpu()
            if norm is not None:  # our hybrid encoder normalizes by itself
                mean, std = (torch.tensor(norm[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
                pixels = pixels * std + mean
        if pixels is None:
            return np.zeros((0, 1, chain.embedding.rows.shape[1]), np.float32)
        return chain.adapt(chain.encode_pixels(pixels.numpy(force=True)))

    def _logits(self, tokens: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the logits ``[S, V]`` of one row."""
        chain = self.pipeline.chain
        embeds = chain.merge(tokens, images)
        cache = chain.decoder.new_cache(1, self.pipeline.capacity)
        parts = []
        for start in range(0, len(embeds), chain.prefill_chunk):
            chunk = embeds[None, start : start + chain.prefill_chunk]
            parts.append(chain.decoder.decode(chunk, np.arange(chunk.shape[1]), cache)[0])
        return np.concatenate(parts).astype(np.float32)


def _describe(model: Any, inputs: Any) -> ExportMetadata:
    """Record the model and its inputs; the output has the logits only."""
    with torch.no_grad():
        output = model(**inputs)
    metadata = ExportMetadata(
        architecture=type(model).__name__,
        packages={"dsvl-export": __version__},
        export_dtype=str(model.dtype).removeprefix("torch."),
        export_device="cpu",
        kwargs={name: {"container": type(value).__name__} for name, value in inputs.items()},
    )
    record_output_structure(metadata, type(output)(logits=output.logits))
    return metadata


def register() -> list[str]:
    """Register a format for each backend, and return their names."""
    names = []
    for backend in compiler_names():
        name = f"{PREFIX}{backend}"
        exporter = type("BundleExporter", (BundleExporter,), {"export_format": name})
        register_backend(exporter, BundleRunner)
        names.append(name)
    return names
