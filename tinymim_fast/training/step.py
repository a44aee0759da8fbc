"""One optimizer step: prepare, forward, backward, accumulate, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.profiler import record_function

from tinymim_fast.engine import Engine
from tinymim_fast.training.task import Views


class TrainStep:
    """One optimizer step under an engine; needs no `Task` and no loader, so that a benchmark can time it alone.

    `loss_p = mean over micro-batches of model(*prepare(views))[p]`; the gradient of "loss" updates the weights once.

    Args:
        engine: trains the model.
        prepare: from the views of a micro-batch to the model's inputs; runs without gradients (a teacher's pass).
        parts: names of the losses to return.
        accumulation_steps: micro-batches of a step, as the engine's configuration has them.
        augment: see `Task.augment`.
        start_step: optimizer steps that were taken before.
    """

    def __init__(
        self,
        engine: Engine,
        prepare: Callable[[Views], Views],
        *,
        parts: Sequence[str],
        accumulation_steps: int,
        augment: Callable[[Views, int], Views] | None = None,
        start_step: int = 0,
    ):
        self.engine = engine
        self.prepare = prepare
        self.augment = augment
        self._number = start_step * accumulation_steps  # of the next micro-batch
        self.parts = tuple(parts)
        self.accumulation_steps = accumulation_steps

    def __call__(
        self,
        micro_batches: Iterator[Views],
        have_images: Callable[[], None] = lambda: None,
        may_update: Callable[[], bool] = lambda: True,
    ) -> torch.Tensor:
        """Take `accumulation_steps` micro-batches and update the weights; the host waits for no device here.

        Args:
            micro_batches: of this rank.
            have_images: called when the last micro-batch is there.
            may_update: asked after the last backward pass; False leaves the weights, and the gradient, as they are.

        Returns:
            (parts,) losses of this rank on the device, detached.
        """
        total = 0.0
        for number in range(1, self.accumulation_steps + 1):
            views = next(micro_batches)
            last = number == self.accumulation_steps
            if last:
                have_images()
            total = total + (self.micro_step(views, may_update) if last else self.micro_step(views))
        return total / self.accumulation_steps

    def micro_step(self, views: Views, may_update: Callable[[], bool] = lambda: True) -> torch.Tensor:
        """One micro-batch's losses, (parts,), and its gradient; the last one of a step updates the weights.

        Args:
            views: (B, 3, S, S) each, on the device, and what else the loader gives, such as labels.
            may_update: see `__call__`; asked after this backward pass.
        """
        are_images = [view.is_floating_point() for view in views]  # labels are not, and targets made of them stay fp32
        with torch.no_grad():
            if self.augment is not None:
                views = self.augment(views, self._number)
            self._number += 1
            dtype = self.engine.dtype
            inputs = self.prepare(
                tuple(v.to(dtype) if is_image else v for v, is_image in zip(views, are_images, strict=True))
            )
        with record_function("forward"):
            losses = self.engine.forward(*inputs)
        with record_function("backward"):
            self.engine.backward(losses["loss"])
        with record_function("optimizer"):
            if may_update():
                self.engine.step()
        return torch.stack([losses[part].detach() for part in self.parts])
