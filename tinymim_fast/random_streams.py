"""Random numbers of several users in one process, each of its own, saved and restored with a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from tinymim_fast.distributed import random_states, set_random_states


class RandomStreams:
    """Streams of random numbers by name: inside `with streams.of(name):` PyTorch draws from that one.

    Args:
        device: whose random numbers, beside the CPU's.
        alike: streams that begin where PyTorch's own stands when they are first used: each of several models draws
            what it would alone.
        apart: streams that begin at numbers of their own, from the seed that was set last and their place here.
    """

    def __init__(self, device: torch.device, *, alike: tuple[str, ...] = (), apart: tuple[str, ...] = ()):
        self.device, self.alike, self.apart = device, alike, apart
        self._states: dict[str, dict[str, torch.Tensor]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Draw from one stream inside the with block; PyTorch's own stays where it was."""
        own = random_states(self.device)
        if name in self._states:
            set_random_states(self._states[name], self.device)
        elif name in self.apart:
            seed = np.random.SeedSequence([torch.initial_seed(), 1 + self.apart.index(name)]).generate_state(1)[0]
            torch.manual_seed(int(seed))
        try:
            yield
        finally:
            self._states[name] = random_states(self.device)
            set_random_states(own, self.device)

    def states(self) -> dict[str, torch.Tensor]:
        """Of the streams that were used, each as "NAME.cpu" and "NAME.cuda"."""
        return {f"{name}.{kind}": state for name, kinds in self._states.items() for kind, state in kinds.items()}

    def restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Put back what `states` gave; streams that are not in it begin anew."""
        self._states = {}
        for name, state in states.items():
            stream, _, kind = name.rpartition(".")
            self._states.setdefault(stream, {})[kind] = state
