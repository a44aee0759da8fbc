"""What the steps since the last record gave: losses, still on the device, and time, some of it waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.distributed import World
from tinymim_fast.errors import NonFiniteLossError
from tinymim_fast.training.stop import StopRequests
from tinymim_fast.training.task import Views


class Progress:
    """Collects losses without waiting for the device; `look` waits, on all ranks together.

    Args:
        world: the ranks.
        parts: names of the losses.
        batches: images of a step.
        steps_per_epoch: optimizer steps.
        bad_files: each rank's ledger, made one in `look`.
        start_step: step that the run goes on from.
    """

    def __init__(
        self,
        world: World,
        parts: Sequence[str],
        batches: BatchPlan,
        *,
        steps_per_epoch: int,
        bad_files: BadFiles,
        start_step: int,
    ):
        self.world, self.parts, self.batches = world, tuple(parts), batches
        self.steps_per_epoch, self.bad_files = steps_per_epoch, bad_files
        self.step = start_step
        self._losses: list[torch.Tensor] = []  # on the device, one (parts,) a step, not looked at yet
        self._seen: list[torch.Tensor] = []  # on the host, (steps, parts), not reported yet
        self._lr = 0.0
        self._restart_clocks()

    def timed(self, micro_batches: Iterator[Views], stop: StopRequests) -> Iterator[Views]:
        """The same micro-batches; how long each is waited for is counted, and `stop` knows what is waited for."""
        while True:
            asked = time.perf_counter()
            try:
                with stop.doing("waiting for data"), record_function("data"):
                    views = next(micro_batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield views

    def add(self, losses: torch.Tensor, lr: float) -> None:
        """One optimizer step was queued: its losses, (parts,) on the device, and its learning rate."""
        self._losses.append(losses)
        self._lr = lr
        self.step += 1

    def look(self) -> None:
        """Bring the losses to the host, averaged over ranks; one rank's bad files become known to all. Collective.

        Raises:
            NonFiniteLossError: on every rank, if a loss of any rank is not finite.
        """
        if not self._losses:
            return
        num_steps = len(self._losses)
        mine = torch.stack(self._losses).float().cpu()
        losses, found = zip(*self.world.gather((mine, self.bad_files.reasons)))
        for reasons in found:
            self.bad_files.update(reasons)
        everyone = torch.stack(losses)  # (ranks, steps, parts)
        bad = ~everyone.isfinite().all(-1)
        if bad.any():
            at = int(bad.any(0).float().argmax())
            ranks = ", ".join(str(int(r)) for r in bad[:, at].nonzero()[:, 0])
            raise NonFiniteLossError(f"the loss is not finite at step {self.step - num_steps + at + 1} on rank {ranks}")
        self._seen.append(everyone.mean(0))
        self._losses.clear()

    def record(self) -> dict[str, Any] | None:
        """Mean losses, learning rate and speed since the last record; None where there were no steps. Collective."""
        self.look()
        if not self._seen:
            return None
        steps = torch.cat(self._seen)  # (steps, parts)
        elapsed = time.perf_counter() - self._began
        record = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            **dict(zip(self.parts, steps.mean(0).tolist(), strict=True)),
            "lr": self._lr,
            "images_per_s": round(len(steps) * self.batches.global_batch_size / elapsed, 2),
            "data_wait": round(self._waited / elapsed, 4),
            "time": round(time.time(), 2),
        }
        self._seen.clear()
        self._restart_clocks()
        return record

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the with block is not training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last record was not training."""
        self._began += seconds

    def _restart_clocks(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0
