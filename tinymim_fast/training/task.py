"""What a kind of training hands to the loop."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinymim_fast.config import RunConfig
from tinymim_fast.data.views import TrainView
from tinymim_fast.distributed import World
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.random_streams import RandomStreams

Views = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Validation:
    """How good a model is, measured while it is trained.

    Args:
        measure: numbers by name, of a whole model's fp32 state and of what asks whether to break off; collective, and
            the same on every rank.
        interval: epochs from one to the next.
        metric: the number by which the best checkpoint is chosen; larger is better.
    """

    measure: Callable[[Mapping[str, torch.Tensor], Callable[[], bool]], dict[str, float]]
    interval: int
    metric: str


@dataclass(frozen=True)
class Frozen:
    """A model that `Task.prepare` calls on images alone, without gradients.

    Args:
        module: its forward may be replaced by one that does the same.
        dtype: of its images.
        settings: fields of the configuration that decide what runs in it, with their values, for messages.
        not_alike: why two calls on the same images differ, so that no graph can hold it; empty where they don't.
    """

    module: nn.Module
    dtype: torch.dtype
    settings: dict[str, Any]
    not_alike: str = ""


def _watch_nothing(step: int) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
    return nullcontext({})


@dataclass(frozen=True)
class Task:
    """One kind of training, ready to run: see tasks/.

    Args:
        model: what the engine trains; its forward takes what `prepare` returns and gives losses by name, one "loss".
        prepare: from the views of a micro-batch, on the device, images in the engine's dtype, to the model's inputs;
            runs without gradients.
        parts: names of the losses to report, "loss" first.
        view: what is made of an image.
        weights: the whole model's fp32 state in timm's names, from the engine's trained one.
        info: what the weights file says of itself; `step` and `epoch` are filled in.
        regions: modules, in `model` or called by `prepare`, that are compiled one by one where compiling is wanted.
        frozen: the model that `prepare` calls, where there is one.
        lr_scale: factors on the learning rate by name in `model`, as timm's `lr_scale`; 1 for those not named.
        streams: random numbers beside PyTorch's own, which a continued run goes on with.
        watch: around optimizer step number n, from 1, in a with block; what it gives has at its end, where the step is
            one to look at, each relation head's divergence by name, (heads,) on the device.
        augment: what is done to the views of a micro-batch before, a pure function of them and of its number in the
            run; None for nothing.
        no_weight_decay: names in `model` of what is not decayed, beside 1-D parameters.
        trained: what `weights` was made of, from what it made; wanted with `ema_decay` alone.
        ema_decay: of an average of the weights over steps; None: no average is kept.
        ema_warmup: whether that decay grows from 0.
        validation: None for none.
        kept: what a continued run must find unchanged, beside configuration and images: for each field of the
            configuration that names a file, which it was, as JSON can hold it.
    """

    model: nn.Module
    prepare: Callable[[Views], Views]
    parts: tuple[str, ...]
    view: TrainView
    weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    info: ModelInfo
    regions: tuple[nn.Module, ...] = ()
    frozen: Frozen | None = None
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    streams: RandomStreams | None = None
    watch: Callable[[int], AbstractContextManager[Mapping[str, torch.Tensor]]] = _watch_nothing
    augment: Callable[[Views, int], Views] | None = None
    no_weight_decay: Container[str] = ()
    trained: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    ema_decay: float | None = None
    ema_warmup: bool = False
    validation: Validation | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)


def train_view(config: RunConfig, world: World, *, color_jitter: float | None = None, **changes: Any) -> TrainView:
    """The view that a run's configuration means; with `color_jitter`, of that strength, a second one beside it.

    Args:
        config: of the run.
        world: a GPU gets its views in half precision.
        color_jitter: of brightness, contrast and saturation.
        **changes: further fields of `TrainView`.
    """
    return TrainView(
        img_size=config.img_size,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=None if color_jitter is None else (color_jitter,) * 3,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        # half the bytes; the CPU is slower at it
        dtype=torch.float16 if config.bf16 and world.device.type == "cuda" else torch.float32,
        **changes,
    )


def without_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The same tensors, `prefix` taken off the names that have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def saved_buffers(model: nn.Module, names: Container[str]) -> dict[str, torch.Tensor]:
    """What training changes without a gradient: BatchNorm's statistics as they are now, fp32, rank 0's where it saves.

    Args:
        model: the trained part of a model, as the engine holds it.
        names: of what a checkpoint holds; other buffers are worked out anew at each start.
    """
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in names}
    return {name: buffer.float() if buffer.is_floating_point() else buffer for name, buffer in buffers.items()}
