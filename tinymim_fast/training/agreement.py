"""What ranks ask of the run, agreed on in each step before it changes the weights.

A rank asks when it has the images of the step, and the answer is waited for behind the backward pass, on the host: it
costs nothing beside what the step waits for anyway, and a rank without images can call the whole step off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tinymim_fast.distributed import World, random_states, set_random_states

# What a rank may ask for, the larger winning; above STOP come the reasons of `StopRequests`; UNDONE is added to one.
SAVE, STOP, TOO_MANY_BAD, UNDONE = 1, 2, 100, 1000


class Agreement:
    """One question and one answer a step.

    Args:
        world: the ranks.
        ask: what this rank wants now, 0 for nothing.
    """

    def __init__(self, world: World, ask: Callable[[], int]):
        self._world, self._ask = world, ask
        self._answer = 0

    def start(self) -> None:
        """The step has its images, or blank ones in their place: ask. Collective; nobody waits."""
        self._pending = self._world.start_max(self._ask())

    def may_update(self) -> bool:
        """Wait for the answer, on the host; whether the weights may change."""
        work, answer = self._pending
        work.wait()
        self._answer = int(answer)
        return self._answer < UNDONE

    @property
    def request(self) -> int:
        """What the ranks want at the end of this step: 0, SAVE, STOP + a reason's code, or TOO_MANY_BAD."""
        return self._answer % UNDONE

    @property
    def is_undone(self) -> bool:
        """Whether the step was called off, on all ranks."""
        return self._answer >= UNDONE


class StepStart:
    """What a step changes before its update: this rank's random numbers, and the model's buffers (BatchNorm's).

    Args:
        model: as the engine holds it.
        device: of the random numbers beside the CPU's.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._buffers, self._device = list(model.buffers()), device
        self._step: int | None = None

    def keep(self, step: int) -> None:
        """The step after `step` begins; no device is waited for."""
        self._step = step
        self._kept = random_states(self._device), [buffer.clone() for buffer in self._buffers]

    def restore(self, step: int) -> None:
        """As if the step after `step` had not begun; nothing where it hasn't."""
        if step != self._step:
            return
        states, buffers = self._kept
        set_random_states(states, self._device)
        for buffer, kept in zip(self._buffers, buffers, strict=True):
            buffer.copy_(kept)
