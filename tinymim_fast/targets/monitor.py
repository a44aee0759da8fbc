"""Each relation head's divergence from the teacher's, looked at now and then while a student trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.profiler import record_function

from tinymim_fast.errors import InputError
from tinymim_fast.kernels import relation_kl
from tinymim_fast.kernels.reference import projections
from tinymim_fast.targets.relations import RelationTarget


class HeadMonitor:
    """KL(teacher || student) of each relation head, from the tensors that the relation losses get anyway.

    Of the steps that are looked at it costs the relation losses once more, forward only and without a gradient; nothing
    of training changes, and the host waits for nothing. Of targets with softmax; where a target has several pairs of
    blocks, the mean over them.

    Args:
        model: what trains, with its targets; forward hooks are added to the relation targets.
        interval: optimizer steps between two looks.

    Raises:
        InputError: there is no such target; argument "interval".
    """

    def __init__(self, model: nn.Module, interval: int):
        self.interval = interval
        self._sums: dict[str, torch.Tensor] | None = None  # while a step is looked at
        self._num: dict[str, int] = {}
        watched = 0
        for path, module in model.named_modules():
            if isinstance(module, RelationTarget) and module.settings.softmax:
                module.register_forward_hook(partial(self._note, _prefix(path, module)))
                watched += 1
        if not watched:
            raise InputError(
                f"got {interval}, but no target compares relations by softmax; want 0", argument="interval"
            )

    @contextmanager
    def around(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Around optimizer step number `step`, from 1: what it gives is filled at the end, where this step is due.

        By relation, behind the names of student and target where they have any: (heads,) fp32 on the device, nats, mean
        over this rank's images.
        """
        seen: dict[str, torch.Tensor] = {}
        self._sums = {} if step % self.interval == 0 else None
        try:
            yield seen
            if self._sums is not None:
                seen |= {name: total / self._num[name] for name, total in self._sums.items()}
        finally:
            self._sums, self._num = None, {}

    def _note(self, prefix: str, target: RelationTarget, args: tuple, losses: dict[str, torch.Tensor]) -> None:
        if self._sums is None:
            return
        settings = target.settings
        with torch.no_grad(), record_function("monitor"):
            for qkv_s, qkv_t in zip(*args, strict=True):
                of_student, of_teacher = (projections(qkv.detach(), settings.heads) for qkv in (qkv_s, qkv_t))
                for x, y in settings.names:
                    pair = of_student[x], of_student[y], of_teacher[x], of_teacher[y]
                    rows = relation_kl(*pair, backend=target.backend, reduction="none")  # (B, H, N)
                    name = f"{prefix}{x}{y}"
                    self._sums[name] = self._sums.get(name, 0) + rows.float().mean((0, 2))
                    self._num[name] = self._num.get(name, 0) + 1


def _prefix(path: str, target: RelationTarget) -> str:
    """ "small/relations/", of the target `target` of a student, as losses are named; less where there is one alone."""
    parts = path.split(".")
    student = f"{parts[1]}/" if parts[0] == "students" else ""
    return student if target.name is None else f"{student}{target.name}/"
