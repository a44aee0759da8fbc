"""Random erasing, Mixup and CutMix of whole batches on the device: timm's, as functions of (seed, batch, rank).

timm draws from the global generators of Python, NumPy and PyTorch; here they are seeded for the moment of the call, and
are afterwards what they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing


class BatchAugment:
    """First erases, then mixes: of images and classes makes images and, where it mixes, shares of classes.

    Args:
        erasing: timm's, None for none; its device is that of the images.
        mixup: timm's, None for none.
        seed: of the run.
        rank: this process.
    """

    def __init__(self, erasing: RandomErasing | None, mixup: Mixup | None, *, seed: int, rank: int):
        self.erasing, self.mixup = erasing, mixup
        self.seed, self.rank = seed, rank

    def __call__(self, views: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch after both.

        Args:
            views: images (B, 3, S, S), normalised, and labels (B,), int64; neither is changed.
            number: of the batch in the run.

        Returns:
            images, and labels (B,), int64, or with Mixup or CutMix targets (B, classes), fp32, smoothed by it.
        """
        images, targets = views
        if self.erasing is None and self.mixup is None:
            return images, targets
        images = images.clone()
        with _seeded(images.device, self.seed, number, self.rank):
            if self.erasing is not None:
                images = self.erasing(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
        return images, targets


@contextmanager
def _seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Global generators started from `key` inside the with block, and afterwards as they were before."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(words[0])
            np.random.seed(words[1])
            torch.manual_seed(words[2])
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
