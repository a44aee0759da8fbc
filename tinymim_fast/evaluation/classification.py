"""How many images of a split a classifier gets right, shared among ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import nn

from tinymim_fast.data import ImageIndex, build_eval_loader
from tinymim_fast.data.views import EvalView


@dataclass(frozen=True)
class Counts:
    """What a classifier did with some images; counts of ranks add up.

    Args:
        images: how many there were.
        top1: of those, whose class it put first.
        top5: of those, whose class is among its first five.
        loss_sum: sum of their cross-entropies, nats.
    """

    images: int = 0
    top1: int = 0
    top5: int = 0
    loss_sum: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.images + other.images,
            self.top1 + other.top1,
            self.top5 + other.top5,
            self.loss_sum + other.loss_sum,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """`val_loss`, nats, and `top1` and `top5` in per cent, as timm reports them."""
        per_image = 1 / max(self.images, 1)
        return {
            "top1": 100 * self.top1 * per_image,
            "top5": 100 * self.top5 * per_image,
            "val_loss": self.loss_sum * per_image,
        }


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    index: ImageIndex,
    view: EvalView,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    loader: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    bf16: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Counts:
    """What a classifier does with this rank's part of a split.

    Args:
        model: gives logits (B, classes); on `device`, in evaluation mode.
        index: the images, and labels that are positions in the logits.
        view: what is made of an image.
        batch_size: images per forward pass of this rank.
        workers: decoding threads or processes of this rank.
        device: where the model is.
        loader: see `build_eval_loader`.
        rank: this process among all that share the images; each image comes once over all of them.
        world_size: how many those are.
        bf16: autocast to bf16.
        stopping: asked before each batch; where it says so, the counts are of the batches before.
    """
    counted = ClassificationEvaluator(device)
    with build_eval_loader(
        index,
        view,
        batch_size=batch_size,
        loader=loader,
        rank=rank,
        world_size=world_size,
        device=device,
        workers=workers,
    ) as batches:
        for images, labels, _ in batches:
            if stopping():
                break
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(images)
            counted.update(logits, labels)
    return Counts(*counted.counts.tolist(), counted.loss_sum.item())
