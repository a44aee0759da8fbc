"""A linear classifier on frozen features: multinomial logistic regression, solved to its optimum.

    min over W, b of  mean_i CE(W x_i + b, y_i) + weight_decay / 2 * |W|^2

by L-BFGS (torch.optim), on features standardised over the training images. The problem is convex, so there is no
learning rate, schedule or augmentation to tune; `weight_decay` is chosen on a part of the training images, and the
validation images are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD_OUT = 0.1  # of the training images, to choose the weight decay on
CHUNK = 1 << 16  # images at once
MAX_ITERATIONS = 500


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy of the linear classifier that fits the training features.

    Args:
        train: features (n, C) and labels (n,).
        val: the same, of what is classified; a label means the same class as in `train`.
        num_classes: of the labels.
        weight_decays: to choose from.
        seed: of the choice of the images that are held out.
        device: to fit on, in fp64 on a CPU and in fp32 elsewhere; holds the features.

    Returns:
        `num_images`, `top1_correct` and `top1` (per cent), as `top_accuracies` has them; `weight_decay`, the one
        chosen; `held_out_top1` by weight decay, per cent, on the images held out of the first fit.
    """
    dtype = torch.float64 if torch.device(device).type == "cpu" else torch.float32
    (x, y), (queries, truth) = ((x.to(device, dtype), y.to(device)) for x, y in (train, val))
    std, mean = torch.std_mean(x, dim=0)
    x, queries = ((f - mean) / (std + 1e-6) for f in (x, queries))
    y = y.clone()  # made in inference mode, a tensor can't be saved for backward
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(device)
    held, rest = order.split([max(1, int(HELD_OUT * len(x))), len(x) - max(1, int(HELD_OUT * len(x)))])
    fit, held_out = None, {}
    for weight_decay in sorted(weight_decays, reverse=True):  # each starts where the one before ended
        fit = fit_logistic(x[rest], y[rest], num_classes=num_classes, weight_decay=weight_decay, start=fit)
        held_out[weight_decay] = 100 * _num_right(fit, x[held], y[held]) / len(held)
    best = max(held_out, key=held_out.get)  # of equals the largest
    fit = fit_logistic(x, y, num_classes=num_classes, weight_decay=best)
    right = _num_right(fit, queries, truth)
    return {
        "num_images": len(queries),
        "top1_correct": right,
        "top1": 100 * right / len(queries),
        "weight_decay": best,
        "held_out_top1": held_out,
    }


def fit_logistic(
    x: Tensor, y: Tensor, *, num_classes: int, weight_decay: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (classes, C) and bias (classes,) at the minimum; see the head of this file.

    Args:
        x: features (n, C), fp32 or fp64.
        y: labels (n,).
        num_classes: of the labels.
        weight_decay: more than 0, else there may be no minimum.
        start: weight and bias to begin with; by default zeros.
    """
    weight, bias = start or (x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-13,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * weight_decay * weight.square().sum()
        total.backward()
        for features, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            part = F.cross_entropy(F.linear(features, weight, bias), labels, reduction="sum") / len(x)
            part.backward()
            total = total + part
        return total.detach()

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _num_right(fit: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> int:
    weight, bias = fit
    parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    return sum(int((F.linear(features, weight, bias).argmax(1) == labels).sum()) for features, labels in parts)
