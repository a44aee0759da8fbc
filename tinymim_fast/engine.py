"""DeepSpeed, and nothing of vision transformers: start-up, optimizer, ZeRO, mixed precision, optimizer state.

What DeepSpeed is told is worked out in deepspeed_config.py; what of its step is replaced is in deepspeed_step.py.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import nn

from tinymim_fast.deepspeed_step import gradient_norm
from tinymim_fast.distributed import (
    World,
    complete_environment,
    join,
    leave,
    random_states,
    seed_rank,
    set_random_states,
)
from tinymim_fast.errors import InputError
from tinymim_fast.parameter_groups import parameter_groups
from tinymim_fast.random_streams import RandomStreams

STATE = "optimizer.safetensors"
MAX_BUCKET = 500_000_000  # DeepSpeed's own size of a bucket of gradients
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by their names in PyTorch
deepspeed.utils.logger.setLevel(logging.WARNING)  # a user's run needs its warnings, not every step of its set-up


def start(max_wait_minutes: float | None = None) -> World:
    """Join the processes that `deepspeed`, `torchrun` or nobody (plain `python`) started.

    Args:
        max_wait_minutes: what a run may wait for data or for a rank, so that no collective gives up before; 0: any
            time. None: the backend's time-outs.
    """
    local_rank = complete_environment()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce with g++ here, and die where there is none. gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        if local_rank >= accelerator.device_count():
            raise InputError(
                f"local rank {local_rank}, but this node has {accelerator.device_count()} devices; start fewer "
                "processes (deepspeed --num_gpus, torchrun --nproc-per-node)"
            )
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    timeout = None
    if max_wait_minutes is not None:
        timeout = timedelta(minutes=max_wait_minutes + 5) if max_wait_minutes else timedelta(days=365)
    store = join(accelerator.communication_backend_name(), timeout)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, host_group, store)


def stop(world: World | None = None) -> None:
    """Leave the process group; with `world`, together with the other ranks: see `leave`."""
    if world is not None:
        leave(world.store)
    elif dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """One module under DeepSpeed and AdamW, with a learning rate by optimizer step.

    Args:
        model: fp32, on the CPU; its forward's gradient must reach every parameter that requires one.
        ds_config: DeepSpeed's, see `deepspeed_config`.
        world: from `start`.
        lr_at: learning rate by optimizer step.
        weight_decay: of AdamW, see `parameter_groups`.
        opt_betas: AdamW's.
        lr_scale: factors on the learning rate by parameter's name; 1 for those that are not named.
        no_weight_decay: names of parameters that are not decayed, beside 1-D ones.
        seed: of the random numbers of a continuation whose own can't be restored.
        streams: random numbers beside PyTorch's own that its state holds.
        regions: modules of `model` that are compiled: ZeRO-3 gathers the weights of one at once, no hooks inside.

    `forward` takes what the model's forward takes; floating-point inputs in `dtype`.

    Attributes:
        step_applied: False after a step that was left out: see `step`.
        ds_config: what DeepSpeed was told in the end.
    """

    def __init__(
        self,
        model: nn.Module,
        ds_config: dict[str, Any],
        world: World,
        *,
        lr_at: Callable[[int], float],
        weight_decay: float = 0.05,
        opt_betas: tuple[float, float] = (0.9, 0.95),
        lr_scale: Mapping[str, float] | None = None,
        no_weight_decay: Container[str] = (),
        seed: int = 0,
        streams: RandomStreams | None = None,
        regions: Iterable[nn.Module] = (),
    ):
        half = ds_config["bf16"]["enabled"] or ds_config.get("torch_autocast", {}).get("enabled", False)
        self.world = world
        self.dtype = torch.bfloat16 if half else torch.float32
        self._seed = seed
        self._streams = streams or RandomStreams(world.device)
        self._lr_at = lr_at
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in self._trained.items()}
        self._stage_3 = ds_config["zero_optimization"]["stage"] == 3
        exact = {name: p.detach().clone() for name, p in self._trained.items()}
        # DeepSpeed fills a buffer of so many numbers at each step: by itself 5e8, whatever the model's size.
        num_parameters = sum(p.numel() for p in self._trained.values())
        zero_config = {"reduce_bucket_size": min(num_parameters, MAX_BUCKET), **ds_config["zero_optimization"]}
        self.ds_config = {**ds_config, "zero_optimization": zero_config}
        scales = {p: (lr_scale or {}).get(name, 1.0) for name, p in self._trained.items()}
        undecayed = {p for name, p in self._trained.items() if name in no_weight_decay}
        groups = parameter_groups(model.parameters(), weight_decay, scales, undecayed)
        for group in groups:
            group["lr"] = group["lr_scale"]  # the schedule multiplies it
        self._adamw = torch.optim.AdamW(groups, lr=1.0, betas=opt_betas, fused=True)
        for region in regions:
            set_z3_leaf_module(region, True)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=list(self._trained.values()),
                optimizer=self._adamw,
                # a group's lr is its lr_scale: the multiplier is the rate. DeepSpeed steps it once an optimizer step.
                lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, lr_at),
                config=self.ds_config,
            )
        self._states_of = [p for group in self._adamw.param_groups for p in group["params"]]  # flat parts under ZeRO
        if self._stage_3:  # which puts them into the groups for the moment of a step only
            self._states_of = self._engine.optimizer.fp32_partitioned_groups_flat
        for name, parameter in self._trained.items():
            if parameter.dtype != torch.float32:  # DeepSpeed made the master weights from ones already rounded
                self._set(parameter, exact[name])
        self._start_at(0)
        self.step_applied = True
        self._looks_at_gradients = ds_config["bf16"].get("check_grad_overflow", False)
        self.forward = self._engine

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step, of parameters whose `lr_scale` is 1."""
        return self._lr_at(self._engine.lr_scheduler.last_epoch)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradient, divided by the accumulation steps; ranks are averaged on the way."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After each backward; updates the weights at the end of each accumulation.

        With `skip_nonfinite`, where the gradient is not finite, on any rank, weights and moments stay on all of them,
        and `step_applied` is False until the next step. The learning rate goes on: it is a function of the step.
        """
        gradient_norm.looked_at = self._looks_at_gradients
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        zero = self._engine.optimizer
        self.step_applied = not self._looks_at_gradients or zero is not self._adamw or self._gradient_is_finite()
        if not self.step_applied:
            for parameter in self._trained.values():  # AdamW passes over it
                parameter.grad = None
        self._engine.step()
        if getattr(zero, "overflow", False):  # ZeRO looked, and DeepSpeed held the schedule back
            self.step_applied = False
            self._engine.lr_scheduler.step()

    def _gradient_is_finite(self) -> bool:
        """Waits for the device, as ZeRO does at each step."""
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    @property
    def masters(self) -> list[torch.Tensor]:
        """The fp32 weights that this rank's optimizer updates, where they lie: flat parts of all of them under ZeRO."""
        return [p.detach() for p in self._states_of]

    def trained_state(self, instead: Sequence[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """fp32 master weights of what the optimizer trains, on the CPU. Collective.

        Args:
            instead: what to give in place of `masters`, a tensor for each, such as their average over steps.
        """
        state = {}
        with contextlib.nullcontext() if instead is None else self._exchanged(instead):
            for name, parameter in self._trained.items():
                whole = parameter.dtype == torch.float32 and not self._stage_3 and instead is None
                full = None if whole else safe_get_full_fp32_param(parameter)  # None without ZeRO
                state[name] = (parameter if full is None else full).detach().float().cpu().clone()
        return state

    def scatter(self, state: Mapping[str, torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """The other way: from whole weights by name to a tensor for each of `masters`. Collective.

        Raises:
            InputError: a weight is missing or of another shape.
        """
        with self._exchanged(into):
            for name, parameter in self._trained.items():
                if name not in state or state[name].shape != self._shapes[name]:
                    raise InputError(f"{name} is missing, or not {tuple(self._shapes[name])}")
                if self._engine.optimizer is self._adamw:
                    parameter.data.copy_(state[name])
                self._set(parameter, state[name])
            for tensor, master in zip(into, self.masters, strict=True):
                tensor.copy_(master)

    @contextlib.contextmanager
    def _exchanged(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside the with block the master weights are others; 16-bit weights stay."""
        kept = [master.clone() for master in self.masters]
        try:
            for master, tensor in zip(self.masters, tensors, strict=True):
                master.copy_(tensor)
            yield
        finally:
            for master, value in zip(self.masters, kept, strict=True):
                master.copy_(value)

    @property
    def holds_all(self) -> bool:
        """Whether this rank has all weights and moments itself."""
        return self.world.world_size == 1 or self._engine.optimizer is self._adamw

    def optimizer_state(self, *, alone: bool = False) -> dict[str, torch.Tensor]:
        """Both moments of each weight, whole and fp32, and every rank's random states, on rank 0's CPU. Collective.

        Args:
            alone: without the random states, and not collective, where this rank `holds_all`.

        Nothing in it depends on how many ranks there are or how ZeRO divides the optimizer among them.
        """
        state = {}
        for name, parameter in self._trained.items():
            for moment in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, moment)  # None without ZeRO
                if full is None:
                    full = self._adamw.state[parameter][moment]
                if self.world.is_main:
                    state[f"{moment}.{name}"] = full.detach().cpu()
        mine = {**random_states(self.world.device), **self._streams.states()}
        for rank, random in enumerate([] if alone else self.world.gather(mine)):
            state.update({f"random_{kind}.{rank}": tensor for kind, tensor in random.items()})
        return state

    def load(self, folder: Path) -> dict[str, Any]:
        """Take over what `save_state` wrote; returns its `client_state`. Collective.

        The weights are not in it: the model that the engine was made of must hold them. Random states are restored
        where the number of ranks and the kind of device are those of saving; else they are drawn from (seed, step,
        rank).

        Raises:
            InputError: no such file, or of another model.
        """
        path = folder / STATE
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                client_state = json.loads(file.metadata()["client_state"])
                self._start_at(client_state["step"])
                for name, parameter in self._trained.items():
                    for moment in MOMENTS:
                        value = file.get_tensor(f"{moment}.{name}")
                        if value.shape != self._shapes[name]:
                            raise ValueError(
                                f"{moment}.{name} is {tuple(value.shape)}, want {tuple(self._shapes[name])}"
                            )
                        if not value.isfinite().all():
                            raise ValueError(f"{moment}.{name} is not finite")
                        self._set(parameter, value, moment)
                        if parameter in self._adamw.state:  # without ZeRO
                            self._adamw.state[parameter][moment].copy_(value)
                random = {key: file.get_tensor(key) for key in file.keys() if key.startswith("random_")}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: can't be continued from: {error}") from error
        self._restore_random_states(random, client_state["step"])
        return client_state

    def _set(self, parameter: nn.Parameter, value: torch.Tensor, *moment: str) -> None:
        """The fp32 master weight, or a moment, of a parameter that ZeRO may have divided; `value` is whole."""
        if not self._stage_3:
            (safe_set_full_optimizer_state if moment else safe_set_full_fp32_param)(parameter, value, *moment)
            return
        # By itself stage 3 fails where the ranks don't divide the number of elements: the last rank's part is padded.
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.world.world_size - value.numel()))
        part = padded.narrow(0, size * self.world.rank, size)
        (safe_set_local_optimizer_state if moment else safe_set_local_fp32_param)(parameter, part, *moment)

    def _start_at(self, step: int) -> None:
        """Schedule and moments, zero, of an optimizer that took `step` steps."""
        scheduler, lr = self._engine.lr_scheduler, self._lr_at(step)
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": step, "_last_lr": [lr * scale for scale in scheduler.base_lrs]}
        )
        self._engine.global_steps = step
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for parameter in self._states_of:
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
        zero = self._engine.optimizer
        if zero is not self._adamw and not self._stage_3:
            # By itself ZeRO-2 links moments to weights in the step of the first group, when the other groups have none.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _restore_random_states(self, saved: Mapping[str, torch.Tensor], step: int) -> None:
        mine, ranks = {}, set()
        for key, state in saved.items():
            kind, _, rank = key.removeprefix("random_").rpartition(".")
            ranks.add(int(rank))
            if int(rank) == self.world.rank:
                mine[kind] = state
        kinds = random_states(self.world.device).keys()
        own = {kind: mine.pop(kind) for kind in tuple(mine) if "." not in kind}
        if own.keys() != kinds or ranks != set(range(self.world.world_size)):
            seed_rank(self._seed, step, self.world.rank)
            return
        set_random_states(own, self.world.device)
        self._streams.restore(mine)


def save_state(folder: Path, state: Mapping[str, torch.Tensor], client_state: Mapping[str, Any]) -> None:
    """`folder/optimizer.safetensors`, for `files.whole_folder` to sync.

    Args:
        folder: exists.
        state: from `Engine.optimizer_state`.
        client_state: what JSON can hold; "step", the optimizer steps taken, must be in it.
    """
    path = folder / STATE
    safetensors.torch.save_file(dict(state), path, {"format": "pt", "client_state": json.dumps(client_state)})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints memory reports while it sets up, with a garbage collection each: here of new objects only."""
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()
