"""Top-1 and top-5 accuracy of a classifier, each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import nn

from tinymim_fast.data import ImageIndex, build_eval_loader
from tinymim_fast.data.views import EvalView
from tinymim_fast.evaluation.ranks import Share


def top_accuracies(
    model: nn.Module,
    index: ImageIndex,
    view: EvalView,
    share: Share,
    *,
    outputs: Sequence[int] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Images, right ones among them, and the shares of those, over all processes; counted by timm.

    Args:
        model: gives (B, classes) logits, on the share's device.
        index: images, with labels that are positions in `outputs`.
        view: what is made of an image.
        share: this process's part.
        outputs: of the model's outputs, those that compete; None: all.
        stopping: asked after each batch; where it says so, this process counts no further.

    Returns:
        `num_images`, `top1_correct` and `top5_correct`, counts; `top1` and `top5`, per cent; `loss`, the mean
        cross-entropy, nats.

    Raises:
        InputError: an image that can't be decoded.
    """

    def count() -> ClassificationEvaluator:
        evaluator = ClassificationEvaluator()
        for logits, labels, _ in logits_of(model, index, view, share, outputs=outputs):
            evaluator.update(logits, labels)
            if stopping():
                break
        return evaluator

    evaluator = share.on_all(count)
    evaluator.counts, evaluator.loss_sum = share.total(evaluator.counts), share.total(evaluator.loss_sum)
    num_images, top1, top5 = evaluator.counts.tolist()
    return {"num_images": num_images, "top1_correct": top1, "top5_correct": top5, **evaluator.summary()}


@torch.inference_mode()
def logits_of(
    model: nn.Module, index: ImageIndex, view: EvalView, share: Share, *, outputs: Sequence[int] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits (B, outputs), labels (B,) and sample ids (B,) of this process's images, on the CPU, fp32.

    Args:
        model: see `top_accuracies`.
        index: the images.
        view: what is made of an image.
        share: this process's part.
        outputs: see `top_accuracies`.
    """
    with build_eval_loader(index, view, **share.loading) as loader:
        for images, labels, sample_ids in loader:
            logits = model(images).float().cpu()
            yield logits if outputs is None else logits[:, outputs], labels.cpu(), sample_ids.cpu()
