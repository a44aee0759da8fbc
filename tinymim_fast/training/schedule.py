"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from tinymim_fast.config import RunConfig


def lr_schedule(config: RunConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate by optimizer step: linear warm-up from `warmup_lr`, then half a cosine down to `min_lr`.

    `lr(t) = warmup_lr + (peak - warmup_lr) t / w` for `t < w = warmup_epochs * steps_per_epoch`, then
    `min_lr + (peak - min_lr) (1 + cos(pi (t - w) / (T - w))) / 2` with `T = epochs * steps_per_epoch`: MAE's, per step.
    """
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    peak, low, first = config.peak_lr, config.min_lr, config.warmup_lr

    def lr_at(step: int) -> float:
        if step < warmup:
            return first + (peak - first) * step / warmup
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))

    return lr_at
