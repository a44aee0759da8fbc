"""Loaders with small views, and what they give."""

from dataclasses import fields

import torch

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data import build_eval_loader, build_loader
from tinymim_fast.data.views import EvalView, TrainView


def _take(kind, options):
    """The options that are fields of `kind`, taken out of `options`."""
    return {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}


def train_loader(index, loader_name, *, batch_size=8, accumulation_steps=1, world_size=1, **options):
    view = TrainView(**{"img_size": 64, **_take(TrainView, options)})
    batches = BatchPlan(micro_batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=world_size)
    return build_loader(index, view, batches, loader=loader_name, **{"seed": 1, "workers": 2, **options})


def eval_loader(index, loader_name, *, batch_size=8, **options):
    view = EvalView(**{"img_size": 64, "resize_size": 73, **_take(EvalView, options)})
    return build_eval_loader(index, view, batch_size=batch_size, loader=loader_name, **{"workers": 2, **options})


def copies(batches):
    """Each micro-batch as one CPU tensor (views, B, 3, S, S)."""
    return [torch.stack(views).cpu() for views in batches]
