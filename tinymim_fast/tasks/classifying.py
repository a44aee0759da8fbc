"""What fine-tuning takes beside a model: a teacher's answers, batches that are mixed, and its validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.batch_augment import BatchAugment
from tinymim_fast.data.views import EvalView
from tinymim_fast.distributed import World
from tinymim_fast.errors import InputError, flags
from tinymim_fast.evaluation.ranks import Share
from tinymim_fast.evaluation.splits import match_splits
from tinymim_fast.evaluation.top_accuracies import top_accuracies
from tinymim_fast.models.classifier import load_teacher
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.training.task import Validation, Views

if TYPE_CHECKING:
    from tinymim_fast.tasks.finetune import FinetuneConfig


def with_teacher(config: FinetuneConfig, world: World, class_names: tuple[str, ...]) -> Callable[[Views], Views]:
    """`Task.prepare` of a distillation token: images and targets, and the teacher's logits of these images.

    Args:
        config: of the run, with a teacher.
        world: this process; the teacher goes to its device, and sees images in its own normalisation.
        class_names: of the images.

    Raises:
        InputError: no such teacher, or one of other classes.
    """
    with flags(source="teacher_checkpoint", model="teacher_model", metric="teacher_checkpoint"):
        teacher = load_teacher(config.teacher_checkpoint, class_names, model=config.teacher_model).to(world.device)
    mean, std = (torch.tensor(v, device=world.device).view(1, 3, 1, 1) for v in (config.mean, config.std))

    def prepare(views: Views) -> Views:
        images, targets = views
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            logits = teacher(teacher.normalize_input(images.float(), mean, std))
        return images, targets, logits.float()

    return prepare


def find_validation_images(config: FinetuneConfig, world: World, images: ImageIndex) -> ImageIndex | None:
    """The validation split, with the labels of the training images; None where nothing is to be validated.

    Args:
        config: of the run.
        world: rank 0 looks.
        images: to train on.

    Raises:
        InputError: there is none, or its classes are others.
    """
    if not config.val_interval:
        return None

    def find() -> ImageIndex:
        options = {"layout": config.layout, "max_image_pixels": config.max_image_pixels, "workers": config.workers}
        return match_splits(config.data_path, images, find_images(config.data_path, split=config.val_split, **options))

    with flags(split="val_split"):
        try:
            return world.broadcast(find)
        except InputError as error:
            error.argument = error.argument or "data_path"
            raise


def batch_augment(config: FinetuneConfig, world: World, num_classes: int) -> BatchAugment:
    """timm's random erasing, Mixup and CutMix, as the run's settings say."""
    erasing = mixup = None
    if config.reprob:
        erasing = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device=world.device)
    if config.mixes:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
    return BatchAugment(erasing, mixup, seed=config.seed, rank=world.rank)


def validate_on(config: FinetuneConfig, world: World, vit: nn.Module, images: ImageIndex | None) -> Validation | None:
    """Top-1 and top-5 of a model like `vit`, fp32 weights, autocast to bf16 where the run is bf16."""
    if images is None:
        return None
    model = deepcopy(vit).eval().requires_grad_(False)
    made = Preprocessing(config.mean, config.std, config.crop_pct)
    view = EvalView(
        img_size=config.img_size, resize_size=made.resize_size(config.img_size), mean=config.mean, std=config.std
    )
    size = config.validation_batch_size or config.batch_plan(world.world_size).micro_batch_size
    share = Share(world.device, size, config.workers, world.host_group, config.loader)

    def logits(views: torch.Tensor) -> torch.Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            return model(views)

    def validate(weights: Mapping[str, torch.Tensor], stopping: Callable[[], bool]) -> dict[str, float]:
        model.load_state_dict(weights)
        model.to(world.device)
        found = top_accuracies(logits, images, view, share, stopping=stopping)
        return {"top1": found["top1"], "top5": found["top5"], "val_loss": found["loss"]}

    return Validation(validate, interval=config.val_interval, metric="top1")
