"""Runs in this process, as the programs make them, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.programs import TINY
from tinymim_fast.config import name_flags, parse
from tinymim_fast.distributed import World
from tinymim_fast.models.checkpoints import latest_checkpoint
from tinymim_fast.tasks import distill, finetune, pretrain
from tinymim_fast.training import loop
from tinymim_fast.training.metrics import read_metrics
from tinymim_fast.training.task import Task

SIX_STEPS = {"checkpoint_interval": 3, "epochs": 1}  # changes of `distill_flags` for the fixture `six_steps`


class Stopped(Exception):
    """A run that a test ended."""


def distil(world: World, *flags: str, build_task: Callable[..., Task] = distill.build_task) -> None:
    """`train.py FLAGS`, whose errors are raised."""
    _run(distill.DistillConfig, world, flags, build_task)


def pretrain_mae(world: World, *flags: str, build_task: Callable[..., Task] = pretrain.build_task) -> None:
    """`pretrain.py FLAGS`, whose errors are raised."""
    _run(pretrain.PretrainConfig, world, flags, build_task)


def fine_tune(world: World, *flags: str, build_task: Callable[..., Task] = finetune.build_task) -> None:
    """`finetune.py FLAGS`, whose errors are raised."""
    _run(finetune.FinetuneConfig, world, flags, build_task)


def _run(kind, world, flags, build_task) -> None:
    config = parse(kind, flags, "program")
    with name_flags(kind):
        loop.train(config, world, build_task)


def with_prepare(build_task: Callable[..., Task], wrap: Callable[[Callable], Callable]) -> Callable[..., Task]:
    """A `build_task` whose task has `wrap(prepare)` in place of its `prepare`, which is called once a micro-batch."""

    def build(*args: Any) -> Task:
        task = build_task(*args)
        object.__setattr__(task, "prepare", wrap(task.prepare))
        return task

    return build


def stopping(build_task: Callable[..., Task], num_micro_batches: int) -> Callable[..., Task]:
    """A `build_task` whose run raises `Stopped` where it would begin the micro-batch after `num_micro_batches`."""

    def wrap(prepare):
        calls = []

        def stop_or_prepare(views):
            if len(calls) == num_micro_batches:
                raise Stopped
            calls.append(1)
            return prepare(views)

        return stop_or_prepare

    return with_prepare(build_task, wrap)


def pretrain_flags(image_folder: Path, output_dir: Path, **changes: object) -> list[str]:
    """Flags of a pre-training run of a few steps, as a user would type them."""
    values = {
        "data_path": image_folder,
        "output_dir": output_dir,
        "model": "vit_tiny_patch16_224",
        "model_kwargs": json.dumps(TINY),
        "decoder_embed_dim": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "img_size": 32,
        "epochs": 3,
        "warmup_epochs": 1,
        "train_batch_size": 16,
        "lr": 1e-3,
        "log_interval": 1,
        "workers": 1,
        "tensorboard": "false",
        "loader": "torchvision",
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def finetune_flags(image_folder: Path, output_dir: Path, **changes: object) -> list[str]:
    """Flags of a fine-tuning run of six steps from scratch, with all of timm's augmentations, as a user would type."""
    values = {
        "data_path": image_folder,
        "checkpoint": "none",
        "output_dir": output_dir,
        "model": "vit_tiny_patch16_224",
        "model_kwargs": json.dumps(TINY),
        "img_size": 32,
        "epochs": 1,
        "warmup_epochs": 0.5,
        "train_batch_size": 16,
        "lr": 1e-3,
        "layer_decay": 0.7,
        "drop_path": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "reprob": 0.25,
        "aa": "rand-m9-mstd0.5-inc1",
        "log_interval": 1,
        "workers": 1,
        "tensorboard": "false",
        "loader": "torchvision",
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def losses(output_dir: Path, part: str = "loss") -> list[float]:
    """One part of the loss by record."""
    return [record[part] for record in read_metrics(output_dir)]


def last_step(output_dir: Path) -> int:
    """Step of the newest checkpoint, 0 for none."""
    latest = latest_checkpoint(output_dir)
    return int(latest.name.removeprefix("step_")) if latest else 0
