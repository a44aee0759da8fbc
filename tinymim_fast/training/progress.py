"""What the steps since the last record gave: losses, still on the device, and time, some of it waiting for data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.distributed import World
from tinymim_fast.errors import DataLate, NonFiniteLossError
from tinymim_fast.training.stop import WAITING, StopRequests
from tinymim_fast.training.task import Views

SPIKE = 3.0  # times the average of the loss is a spike
SPIKE_AFTER = 20  # steps, which it takes to have an average


Watched = Mapping[str, torch.Tensor]


class Progress:
    """Collects losses without waiting for the device; `look` waits, on all ranks together.

    Args:
        world: the ranks.
        parts: names of the losses.
        batches: images of a step.
        steps_per_epoch: optimizer steps.
        bad_files: each rank's ledger, made one in `look`.
        start_step: step that the run goes on from.
        num_skipped: steps that were skipped before it.

    Attributes:
        num_skipped: steps whose gradient was not finite, so that they changed nothing.
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
        num_skipped: int = 0,
    ):
        self.world, self.parts, self.batches = world, tuple(parts), batches
        self.steps_per_epoch, self.bad_files = steps_per_epoch, bad_files
        self.step = start_step
        self._losses: list[torch.Tensor] = []  # on the device, one (parts,) a step, not looked at yet
        self._seen: list[torch.Tensor] = []  # on the host, (steps, parts), not reported yet
        self._watched: list[Watched] = []  # on the device, of the steps that had any, not looked at yet
        self._head_kl: dict[str, list[torch.Tensor]] = {}  # on the host, (heads,) each, not reported yet
        self._lr = 0.0
        self.num_skipped = num_skipped
        self._skipped: list[int] = []  # since the last record
        self._spikes: dict[int, float] = {}  # loss by step, since the last record
        self._average, self._num_averaged = 0.0, 0  # of the loss, over about the last 50 steps
        self._restart_clocks()

    def timed(self, micro_batches: Iterator[Views], stop: StopRequests, blank: Callable[[], Views]) -> Iterator[Views]:
        """The same micro-batches; how long each is waited for is counted, and `stop` knows what is waited for.

        Where `stop` gives up waiting, blank ones come from then on.
        """
        while True:
            asked = time.perf_counter()
            try:
                with stop.doing(WAITING), record_function("data"):
                    views = next(micro_batches)
            except StopIteration:
                return
            except DataLate:  # the others wait for this rank's part in the step, which `stop` calls off
                yield from itertools.repeat(blank())
            self._waited += time.perf_counter() - asked
            yield views

    def add(self, losses: torch.Tensor, lr: float, watched: Watched | None = None) -> None:
        """One optimizer step was queued.

        Args:
            losses: (parts,) on the device.
            lr: its learning rate.
            watched: each head's divergence by name, (heads,) on the device; the same names on all ranks.
        """
        self._losses.append(losses)
        if watched:
            self._watched.append(watched)
        self._lr = lr
        self.step += 1

    def skip(self) -> None:
        """The step that was added last changed nothing: its losses, which may be no numbers, don't count."""
        self.num_skipped += 1
        self._skipped.append(self.step)

    def look(self) -> None:
        """Bring the losses to the host, averaged over ranks; one rank's bad files become known to all. Collective.

        Raises:
            NonFiniteLossError: on every rank, if a loss of any rank is not finite.
        """
        if not self._losses:
            return
        num_steps = len(self._losses)
        mine = torch.stack(self._losses).float().cpu()
        watched = [{name: heads.cpu() for name, heads in seen.items()} for seen in self._watched]
        losses, found, heads_of_ranks = zip(*self.world.gather((mine, self.bad_files.reasons, watched)))
        for reasons in found:
            self.bad_files.update(reasons)
        everyone = torch.stack(losses)  # (ranks, steps, parts)
        first = self.step - num_steps + 1
        counts = torch.tensor([step not in self._skipped for step in range(first, self.step + 1)])
        bad = ~everyone.isfinite().all(-1) & counts
        if bad.any():
            at = int(bad.any(0).float().argmax())
            ranks = ", ".join(str(int(r)) for r in bad[:, at].nonzero()[:, 0])
            raise NonFiniteLossError(f"the loss is not finite at step {first + at} on rank {ranks}")
        mean = everyone.mean(0)
        for i in counts.nonzero()[:, 0].tolist():
            self._watch_for_spikes(first + i, float(mean[i, 0]))
        self._seen.append(mean[counts])
        self._losses.clear()
        for of_step in zip(*heads_of_ranks):
            for name in of_step[0]:
                of_ranks = torch.stack([heads[name] for heads in of_step])
                self._head_kl.setdefault(name, []).append(of_ranks.mean(0))
        self._watched.clear()

    def _watch_for_spikes(self, step: int, loss: float) -> None:
        if self._num_averaged >= SPIKE_AFTER and loss > SPIKE * self._average:
            self._spikes[step] = loss
        self._num_averaged += 1
        self._average += (loss - self._average) / min(self._num_averaged, 50)

    def record(self) -> dict[str, Any] | None:
        """Mean losses, learning rate and speed since the last record; None where there were no steps. Collective."""
        self.look()
        if not self._seen:
            return None
        steps = torch.cat(self._seen)  # (steps, parts)
        elapsed = time.perf_counter() - self._began
        means = dict(zip(self.parts, steps.mean(0).tolist(), strict=True)) if len(steps) else {}
        record = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            **means,
            "lr": self._lr,
            "images_per_s": round((len(steps) + len(self._skipped)) * self.batches.global_batch_size / elapsed, 2),
            "data_wait": round(self._waited / elapsed, 4),
            "time": round(time.time(), 2),
        }
        if self._skipped:
            record |= {"num_skipped": self.num_skipped, "skipped_steps": list(self._skipped)}
        if self._spikes:
            record["spikes"] = dict(self._spikes)
        if self._head_kl:
            record["head_kl"] = {name: torch.stack(heads).mean(0).tolist() for name, heads in self._head_kl.items()}
        self._head_kl.clear()
        self._seen.clear()
        self._skipped.clear()
        self._spikes.clear()
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
