"""Training of the tiny checkpoint: ``python -m reference.tiny.train --output DIR``.

Stage 1 trains vision encoder and adaptor on dense targets (the object in each image token's cell).
Stage 2 trains adaptor and decoder on conversations about a pool of pictures whose vision features
are computed once. Without stage 1, the loss stays on a plateau. The same command resumes an
interrupted training.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from reference.checkpoint.config_file import parse_config
from reference.checkpoint.write_original import write_original_checkpoint
from reference.model.deepseek_vl import DeepSeekVL
from reference.tiny.batches import (
    DENSE_HEADS,
    GRID,
    Batch,
    ChatBatches,
    DenseBatches,
    to_pixels,
    token_id,
)
from reference.tiny.curve import plot_curve
from reference.tiny.pictures import Scene, draw_scene
from reference.tiny.tokenizer import build_corpus, train_tokenizer
from runtimes.text.prompt import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class Stage:
    """Steps, batch size and learning rates of a stage.

    A rate is constant, then falls linearly to zero over the share ``decay`` of the steps.
    """

    number: int
    steps: int
    batch: int
    matrix_rate: float  # of Muon, for hidden matrices
    other_rate: float  # of AdamW, for all other parameters
    decay: float


STAGES = (
    Stage(1, 2400, 64, 0.02, 2e-3, 0.2),
    Stage(2, 1800, 72, 0.015, 2e-3, 0.3),
)
POOL_SIZE = 24_000  # pictures of stage 2
DENSE_WEIGHTS = {"name": 1.0, "colour": 0.7, "order": 1.0, "row": 0.1, "column": 0.1}


def dense_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss and the accuracies of the dense heads.

    The loss is cross-entropy, with weight 0.15 for background; accuracies exclude background.

    Args:
        logits: ``[N, T, classes of all heads]``.
        targets: ``[N, heads, T]``.

    Returns:
        The loss, and accuracy by head.
    """
    loss, accuracy = logits.new_zeros(()), {}
    parts = torch.split(logits.float(), list(DENSE_HEADS.values()), dim=-1)
    for index, ((name, classes), part) in enumerate(zip(DENSE_HEADS.items(), parts, strict=True)):
        target = targets[:, index]
        weight = torch.ones(classes)
        background = 0 if name in ("name", "colour", "order") else None
        if background is not None:
            weight[background] = 0.15
        loss = loss + DENSE_WEIGHTS[name] * F.cross_entropy(part.flatten(0, 1), target.flatten(), weight)
        hits = part.argmax(-1) == target
        accuracy[name] = float((hits[target > 0] if background == 0 else hits).float().mean())
    return loss, accuracy


@dataclass(frozen=True)
class FeaturePool:
    """Scenes and vision features of pictures; features are bfloat16, ``[POOL_SIZE, T, C]`` each."""

    scenes: list[Scene]
    features: tuple[Tensor, ...]


@torch.no_grad()
def build_feature_pool(model: DeepSeekVL) -> FeaturePool:
    """Draw the pictures of the pool and encode them with the vision encoder of stage 1."""
    scenes: list[Scene] = []
    parts: list[tuple[Tensor, ...]] = []
    for first in track(range(0, POOL_SIZE, 80), "encoding the pool"):
        drawn = [draw_scene((2, index)) for index in range(first, first + 80)]
        scenes += [scene for _, scene in drawn]
        pixels = torch.from_numpy(np.stack([to_pixels(image) for image, _ in drawn]))
        with torch.autocast("cpu", torch.bfloat16):
            features = model.vision_encoder(pixels)
        parts.append(tuple(part.to(torch.bfloat16) for part in features))
    return FeaturePool(scenes, tuple(torch.cat(part) for part in zip(*parts, strict=True)))


class TrainingModel(nn.Module):
    """The model with the additional heads of training."""

    def __init__(self, model: DeepSeekVL, image_token_id: int) -> None:
        """Add the heads to a model."""
        super().__init__()
        self.model = model
        self.image_token_id = image_token_id
        width = model.config.decoder.width
        self.dense = nn.Linear(width, sum(DENSE_HEADS.values()))
        # Predicts the image of each image token from the middle layer of the decoder. Without this
        # loss the model takes long to learn that "Figure 2" means the second image.
        self.which = nn.Linear(width, 2)
        self._halfway = torch.zeros(0)
        middle = model.decoder.layers[len(model.decoder.layers) // 2 - 1]
        middle.register_forward_hook(self._keep_halfway)

    def _keep_halfway(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._halfway = output

    def which_loss(self, tokens: Tensor) -> Tensor:
        """Compute the cross-entropy of the image number (0 or 1) at every image token."""
        is_image = tokens == self.image_token_id
        number = (is_image.cumsum(1) - 1) // GRID**2
        return F.cross_entropy(self.which(self._halfway[is_image]).float(), number[is_image])

    def forward(self, batch: Batch, pool: FeaturePool | None) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a batch and the numbers to log; ``pool`` is None in stage 1."""
        with torch.autocast("cpu", torch.bfloat16):
            if pool is None:
                image_embeds = self.model.encode_image(batch.pixels)  # [N, T, D]
            else:
                image_embeds = self.model.adaptor(*(part[batch.pooled] for part in pool.features))
            loss, numbers = dense_loss(self.dense(image_embeds), batch.dense)
            if not batch.tokens.numel():
                return loss, numbers
            embeds = self.model.merge(batch.tokens, image_embeds, self.image_token_id)
            logits = self.model.logits(embeds)  # [B, S, V]
        is_answer = batch.answers[:, 1:]
        predicted, target = logits[:, :-1][is_answer], batch.tokens[:, 1:][is_answer]
        answer_loss = F.cross_entropy(predicted, target)
        numbers |= {
            "answer_loss": answer_loss.item(),
            "token_accuracy": float((predicted.argmax(-1) == target).float().mean()),
        }
        which_loss = self.which_loss(batch.tokens)
        numbers["which_loss"] = which_loss.item()
        return answer_loss + 0.2 * loss + 0.1 * which_loss, numbers


def initialize_weights(model: DeepSeekVL) -> None:
    """Initialize weights from N(0, 0.02), scaled down by depth in residual projections (GPT-2)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight"))
            std = 0.02 / (2 * 4) ** 0.5 if scaled else 0.02
            if "rel_pos" not in name:
                nn.init.normal_(parameter, std=std if parameter.dim() != 4 else parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    assert model.vision_encoder.high is not None
    nn.init.ones_(model.vision_encoder.high.hd_alpha)


def build_optimizers(trainee: TrainingModel, stage: Stage) -> list[torch.optim.Optimizer]:
    """Build Muon (Keller Jordan, 2024) for hidden matrices and AdamW for all other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        if stage.number == 2 and "vision_encoder" in name:
            continue
        hidden = parameter.dim() == 2 and not any(
            part in name for part in ("token_embedding", "head", "dense", "which", "rel_pos")
        )
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=stage.matrix_rate, weight_decay=0.05, ns_steps=4),
        torch.optim.AdamW(others, lr=stage.other_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate_factor(stage: Stage, step: int) -> float:
    """Return the factor of the learning rate: 50 warm-up steps, constant, then linear decay."""
    left = (stage.steps - step) / (stage.steps * stage.decay)
    return min(1.0, (step + 1) / 50, left)


def run_stage(trainee: TrainingModel, stage: Stage, tokenizer: Tokenizer, output: Path) -> None:
    """Run a stage from its last saved state to its end; appends to ``curve.jsonl``."""
    state_file = output / f"stage{stage.number}.pt"
    optims, start = build_optimizers(trainee, stage), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["step"]
        trainee.load_state_dict(state["model"])
        if start >= stage.steps:
            return
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
    pool = build_feature_pool(trainee.model) if stage.number == 2 else None
    batches: Dataset[Batch] = (
        ChatBatches(pool.scenes, stage.batch, tokenizer) if pool else DenseBatches(stage.batch)
    )
    loader = DataLoader(
        batches, batch_size=None,
        sampler=range(start, stage.steps), num_workers=1, prefetch_factor=4,
    )  # fmt: skip
    columns = (TextColumn("stage {task.fields[stage]}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))  # fmt: skip
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("", total=stage.steps, completed=start, stage=stage.number, numbers="")
        for step, batch in enumerate(loader, start):
            begun = time.time()
            for optim, rate in zip(optims, (stage.matrix_rate, stage.other_rate), strict=True):
                for group in optim.param_groups:
                    group["lr"] = rate * learning_rate_factor(stage, step)
            loss, numbers = trainee(batch, pool)
            trainee.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            for optim in optims:
                optim.step()
            done = step + 1
            shown = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            progress.update(task, completed=done, numbers=shown)
            if done % 20 == 0:
                line = {"stage": stage.number, "step": done, "loss": loss.item(), **numbers,
                        "seconds": round(time.time() - begun, 2)}  # fmt: skip
                with (output / "curve.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
            if done % 100 == 0 or done == stage.steps:
                saved = {"step": done, "model": trainee.state_dict(),
                         "optimizers": [optim.state_dict() for optim in optims]}  # fmt: skip
                torch.save(saved, state_file.with_suffix(".tmp"))
                state_file.with_suffix(".tmp").replace(state_file)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the state, the curve and the checkpoint.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the tiny checkpoint in less than an hour on two idle CPU cores; can be resumed."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    raw = json.loads((Path(__file__).parent / "config.json").read_text())
    torch.manual_seed(0)
    model = DeepSeekVL(parse_config(raw, "config.json"))
    tokenizer = train_tokenizer(build_corpus(2000))
    trainee = TrainingModel(model, token_id(tokenizer, IMAGE_PLACEHOLDER))
    initialize_weights(model)
    for stage in STAGES:
        run_stage(trainee, stage, tokenizer, output)
    write_original_checkpoint(model, raw, tokenizer, output / "checkpoint")
    plot_curve(output / "curve.jsonl", output / "curve.svg")


if __name__ == "__main__":
    typer.run(main)
