"""This process among those that share an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tinymim_fast.data.loader import LoaderName
from tinymim_fast.errors import InputError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """Which images this process evaluates, where and how many at once; each image comes once over all processes.

    Args:
        device: where the model is.
        batch_size: images per forward pass of this process.
        workers: decoding threads or processes of this process.
        group: all that share the images, of a backend that sends CPU tensors; None for a process alone.
        loader: see `build_eval_loader`.
    """

    device: torch.device
    batch_size: int = 64
    workers: int = 2
    group: dist.ProcessGroup | None = None
    loader: LoaderName = "auto"

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank(self.group) if self.group else 0

    @property
    def world_size(self) -> int:
        """How many processes share the images."""
        return dist.get_world_size(self.group) if self.group else 1

    @property
    def loading(self) -> dict[str, Any]:
        """For `build_eval_loader`."""
        names = ("batch_size", "workers", "loader", "device", "rank", "world_size")
        return {name: getattr(self, name) for name in names}

    def on_all(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on this process, once it gave something on all; an `InputError` of one is raised on all."""
        value, error = None, None
        try:
            value = make()
        except InputError as caught:
            error = caught
        errors = [error]
        if self.group is not None:
            errors = [None] * self.world_size
            dist.all_gather_object(errors, error, group=self.group)
        for error in errors:
            if error is not None:
                raise error
        return value

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum over processes of a CPU tensor, on each of them."""
        counts = counts.clone()
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts
