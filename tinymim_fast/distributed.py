"""Ranks: which process of the run this is, what all of them agree on, and each one's random numbers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the others of the run.

    Args:
        rank: number of this process, 0 .. world_size - 1.
        world_size: processes of the run.
        device: the one that this process trains on.
        host_group: all ranks, of a backend that sends CPU tensors, so that agreeing waits for no device.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes the files."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; an exception of it is raised on every rank."""
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [make()]
            except Exception as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def start_max(self, flag: int) -> tuple[dist.Work, torch.Tensor]:
        """Begin the maximum of a small number over ranks, on the host; no device is waited for."""
        tensor = torch.tensor([flag], dtype=torch.int32)
        return dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True), tensor


def free_port() -> int:
    """A TCP port of this machine that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Start this rank's random numbers, for drop path and masks; other ones for each (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
