"""Ranks: which process of the run this is, what all of them agree on, and each one's random numbers."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tinymim_fast.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among the others of the run.

    Args:
        rank: number of this process, 0 .. world_size - 1.
        world_size: processes of the run.
        device: the one that this process trains on.
        host_group: all ranks, of a backend that sends CPU tensors, so that agreeing waits for no device.
        store: where ranks found each other; what one sets, others can read without a collective.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup
    store: dist.Store

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


# What launchers call the number of a process on its machine, where it isn't LOCAL_RANK: SLURM's srun, Open MPI.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


def complete_environment() -> int:
    """Check what a launcher put into the environment, and add what it left out; returns the local rank.

    Without RANK this is a run of one process. Where LOCAL_RANK lacks, SLURM's or Open MPI's is taken, else 0: one
    process a machine.

    Raises:
        InputError: a variable is missing or no number; names it.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    os.environ["LOCAL_RANK"] = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0")
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"RANK is set, but not {', '.join(missing)}; start with deepspeed or torchrun, set RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset RANK to train in one process"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise InputError(f"got {os.environ[name]!r}, want a number", argument=f"environment variable {name}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not rank < world_size:
        raise InputError(f"got {rank}, want less than WORLD_SIZE, {world_size}", argument="environment variable RANK")
    return int(os.environ["LOCAL_RANK"])


def join(backend: str, timeout: timedelta | None = None) -> dist.Store:
    """`torch.distributed.init_process_group` for the environment of `complete_environment`; returns its store.

    Where MASTER_ADDR is this machine's loopback address, nothing that is opened here listens on another one: PyTorch's
    own store would listen on all of them, and let strangers read and set keys. (Under torchrun the store is
    torchrun's.)

    Args:
        backend: of `torch.distributed`.
        timeout: of collectives; None: the backend's.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not _is_loopback(address) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world_size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return store
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    listener = -1
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((address, port))
            except OSError as error:
                raise InputError(
                    f"MASTER_PORT {port}: another program listens there ({error}); give another to the launcher "
                    "(deepspeed --master_port, torchrun --master-port)"
                ) from error
            server.listen(world_size + 16)
            listener = server.detach()
    store = dist.TCPStore(
        address, port, world_size, is_master=rank == 0, master_listen_fd=listener if rank == 0 else None
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store


LEAVE_S = 10  # for the others to leave too
# What gloo and NCCL say when a rank is gone.
LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exited|ncclRemoteError|Timed out waiting")


def rank_was_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def leave(store: dist.Store) -> None:
    """Leave the process group when all ranks want to, or after `LEAVE_S`.

    One that tears its connections down while another is still in the last collective makes that one fail, though all
    was said: it would end with another code.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with contextlib.suppress(RuntimeError):  # of a store that is gone, or in vain
        store.set(f"leaves/{rank}", "")
        store.wait([f"leaves/{other}" for other in range(world_size)], timedelta(seconds=LEAVE_S))
    dist.destroy_process_group()


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def free_port() -> int:
    """A TCP port of this machine that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """This process's random states by kind, "cpu" and "cuda", on the CPU; no device is waited for."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Take over what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Start this rank's random numbers, for drop path and masks; other ones for each (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
