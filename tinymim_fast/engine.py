"""DeepSpeed, and nothing of vision transformers: processes, optimizer, ZeRO, mixed precision, checkpoint files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from tinymim_fast.config import RunConfig
from tinymim_fast.errors import InputError

TAG = "deepspeed"
deepspeed.utils.logger.setLevel(logging.WARNING)  # a user's run needs its warnings, not every step of its set-up


@dataclass(frozen=True)
class World:
    """This process among the others of the run."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

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


def start() -> World:
    """Join the processes that `deepspeed`, `torchrun` or nobody (plain `python`) started."""
    if "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single, MASTER_PORT=str(free_port()))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce with g++ here, and die where there is none. gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= accelerator.device_count():
            raise InputError(
                f"local rank {local_rank}, but this node has {accelerator.device_count()} devices; start fewer processes "
                "(deepspeed --num_gpus, torchrun --nproc-per-node)"
            )
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration that `config` means, with `--deepspeed-config` merged in.

    Raises:
        InputError: the file is missing or no JSON object, or contradicts `config`; names the key and the flag.
    """
    micro, accum = config.batch_plan(world_size)
    ours: dict[str, Any] = {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accum,
        "gradient_clipping": config.clip_grad,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    if config.bf16 and config.zero_stage == 0:
        # Without ZeRO, DeepSpeed has no fp32 accumulation for bf16 weights; autocast over fp32 weights is the same thing.
        ours["bf16"] = {"enabled": False}
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if config.deepspeed_config is None:
        return ours
    path = Path(config.deepspeed_config)
    try:
        theirs = json.loads(path.read_text())
        if not isinstance(theirs, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"--deepspeed-config {path}: can't be read: {error}") from error
    for section in ("optimizer", "scheduler"):
        if section in theirs:
            raise InputError(
                f"--deepspeed-config {path}: '{section}' is set by --lr-base, --weight-decay, --warmup-epochs and the like; "
                "leave it out"
            )
    return _merge(ours, theirs, str(path))


FLAGS = {
    "train_batch_size": "--train-batch-size",
    "train_micro_batch_size_per_gpu": "--train-micro-batch-size-per-gpu",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        mine = ours.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            merged[key] = _merge(mine, value, path, name + ".")
        elif key not in ours or mine is None:
            merged[key] = value
        elif value not in ("auto", mine):
            flag = FLAGS.get(name)
            out = f"make {flag} equal or leave it out of the file" if flag else "leave it out of the file"
            raise InputError(f"--deepspeed-config {path}: {name} is {value!r}, but this run has {mine!r}; {out}")
    return merged


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: no decay on 1-D parameters (biases, norms, LayerScale), as in MAE and TinyMIM."""
    decay, no_decay = [], []
    for parameter in parameters:
        if parameter.requires_grad:
            (decay if parameter.ndim > 1 else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


class Engine:
    """One module under DeepSpeed.

    Args:
        model: its forward's gradient must reach every parameter that requires one.
        config: see `RunConfig`.
        world: from `start`.
        lr_at: learning rate by optimizer step.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, lr_at: Callable[[int], float]):
        self.world = world
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        groups = parameter_groups(model.parameters(), config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.opt_betas, fused=world.device.type == "cuda")
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                # lr=1 above: the multiplier is the rate. DeepSpeed steps it once an optimizer step.
                lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, lr_at),
                config=deepspeed_config(config, world.world_size),
            )
        self.forward = self._engine

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step."""
        return self._engine.get_lr()[0]

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """After each backward; updates the weights at the end of each accumulation."""
        self._engine.step()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """fp32 master weights of what the optimizer trains, on the CPU. Collective."""
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                full = parameter if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
                state[name] = full.detach().float().cpu().clone()
        return state

    def save(self, folder: Path, client_state: Mapping[str, Any]) -> None:
        """Optimizer, schedule, weights and this rank's random states, under `folder`. Collective."""
        self._engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state=dict(client_state),
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        torch.save(_random_states(self.world.device), folder / TAG / f"random_states_rank_{self.world.rank:05d}.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        """What `save` wrote; returns `client_state`. Collective.

        Raises:
            InputError: saved on another number of ranks.
        """
        saved = len(list((folder / TAG).glob("random_states_rank_*.pt")))
        if saved != self.world.world_size:
            raise InputError(
                f"{folder}: saved by {saved} ranks, this run has {self.world.world_size}; start it on {saved}"
            )
        with _quiet():
            _, client_state = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        states = torch.load(folder / TAG / f"random_states_rank_{self.world.rank:05d}.pt", weights_only=True)
        torch.set_rng_state(states["cpu"])
        if self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.world.device)
        return client_state


def _quiet() -> contextlib.AbstractContextManager:
    """DeepSpeed prints memory reports while it sets up and loads."""
    return contextlib.redirect_stdout(io.StringIO())


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
