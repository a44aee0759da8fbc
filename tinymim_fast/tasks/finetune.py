"""Fine-tuning: a pre-trained encoder becomes a classifier."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tinymim_fast.config import RunConfig, to_dict
from tinymim_fast.errors import InputError, flags

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tinymim_fast.data import ImageIndex
    from tinymim_fast.data.views import TrainView
    from tinymim_fast.distributed import World
    from tinymim_fast.models.classifier import Classifier
    from tinymim_fast.training.task import Task, Views

logger = logging.getLogger("tinymim_fast")
PREFIX = "model."  # of the classifier's weights under the engine
RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|p(0?\.\d+|1|1\.0)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run: a pre-trained encoder becomes a classifier of the folders of `data_path`.

    Args:
        checkpoint: the encoder: a run's output folder, a checkpoint, an export, an official MAE or TinyMIM `.pth`,
            `timm:NAME`; or "none": from scratch, with the same recipe.
        model: timm name of a VisionTransformer; read from the checkpoint where that says it.
        model_kwargs: passed to `timm.create_model`.
        checkpoint_key: of several models in the checkpoint's file, the one below this key.
        num_heads: changes the number of attention heads, one for all blocks or one for each; without it every block
            keeps those that its weights were trained with.
        num_classes: of the head; by default those of the folder, and another number is an error.
        global_pool: "avg": the mean over patches, with `fc_norm` behind it; "token": the class token.
        head_init_std: standard deviation of the new head's weights.
        linear_probe: train the head alone.
        freeze_blocks: keep patch embedding, tokens and the first so many blocks as they are.
        teacher_checkpoint: a classifier whose classes a distillation token learns, as in DeiT: `timm:NAME`, any model
            of timm's with its own weights, a fine-tuned run or export, or a file of weights; None: no distillation.
        teacher_model: timm name of the teacher, where its file can't tell.
        distillation_type: "hard": the teacher's first class; "soft": its probabilities.
        distillation_alpha: the teacher's share of the loss.
        distillation_tau: temperature of "soft".
        pre_head_dim: width of a layer before the heads, LayerNorm, linear and GELU, with a teacher alone; TinyMIM*-T
            has 1280; 0: none.
        layer_decay: factor on the learning rate for each layer below the head.
        drop_path: rate in the last block; it grows from 0 in the first.
        aa: RandAugment in timm's words, e.g. "rand-m9-mstd0.5-inc1".
        color_jitter: strength of brightness, contrast and saturation jitter; as in timm, none where `aa` is given.
        aug_repeats: views of an image in one batch (repeated augmentation), of as many fewer images; 0 or 1: one.
        reprob: probability of random erasing.
        remode: what erased pixels become: "const" (0), "rand" (a random colour) or "pixel" (random colours).
        recount: largest number of erased boxes.
        mixup: Mixup's alpha; 0 for none.
        cutmix: CutMix's alpha; 0 for none.
        cutmix_minmax: range of the box's share of a side, instead of `cutmix`.
        mixup_prob: probability of mixing a batch, or an image.
        mixup_switch_prob: probability of CutMix where both are on.
        mixup_mode: "batch", "pair" or "elem": what gets a mixture of its own.
        smoothing: label smoothing.
        bce_loss: binary cross-entropy instead of softmax cross-entropy.
        bce_target_thresh: makes targets of `bce_loss` above it 1, and others 0.
        model_ema: keep an average of the weights; it is validated too, and is what a checkpoint gives and exports.
        model_ema_decay: of each step.
        model_ema_warmup: let the decay grow from 0.
        val_split: the folder or shards that are validated on.
        val_interval: epochs between validations; 0: none.
        validation_batch_size: images at once on one rank; default the training's.
        crop_pct: side of the centre crop per short side of the resized image, in validation.
    """

    FREE_ON_RESUME: ClassVar[frozenset[str]] = RunConfig.FREE_ON_RESUME | {
        "validation_batch_size",
        "teacher_checkpoint",
    }

    checkpoint: str
    model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint_key: str | None = None
    num_heads: int | tuple[int, ...] | None = None
    num_classes: int | None = None
    global_pool: Literal["avg", "token"] = "avg"
    head_init_std: float = 2e-5
    linear_probe: bool = False
    freeze_blocks: int = 0
    teacher_checkpoint: str | None = None
    teacher_model: str | None = None
    distillation_type: Literal["hard", "soft"] = "hard"
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0
    pre_head_dim: int = 0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    aa: str | None = None
    color_jitter: float = 0.0
    aug_repeats: int = 0
    reprob: float = 0.0
    remode: Literal["const", "rand", "pixel"] = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.1
    bce_loss: bool = False
    bce_target_thresh: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    val_split: str = "val"
    val_interval: int = 1
    validation_batch_size: int | None = None
    crop_pct: float = 0.875
    # what differs from pre-training's defaults
    scale: tuple[float, float] = (0.08, 1.0)
    epochs: int = 100
    train_batch_size: int = 1024
    lr_base: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 5.0
    opt_betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads or 1,)
        self._check("num_heads", len(heads) > 0 and min(heads) > 0, "numbers above 0")
        self._check("num_classes", self.num_classes is None or self.num_classes > 1, "2 or more")
        self._check(
            "validation_batch_size", self.validation_batch_size is None or self.validation_batch_size > 0, "> 0"
        )
        for name in ("drop_path", "smoothing", "model_ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 to less than 1")
        for name in ("reprob", "mixup_prob", "mixup_switch_prob", "color_jitter"):
            self._check(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("freeze_blocks", "aug_repeats", "mixup", "cutmix", "head_init_std", "val_interval"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("recount", self.recount > 0, "more than 0")
        self._check("distillation_alpha", 0 < self.distillation_alpha < 1, "more than 0 and less than 1")
        wider = self.pre_head_dim == 0 or (self.pre_head_dim > 0 and self.teacher_checkpoint is not None)
        self._check("pre_head_dim", wider, "0, or more with teacher_checkpoint")
        self._check("distillation_tau", self.distillation_tau > 0, "more than 0")
        self._check("teacher_model", self.teacher_model is None or self.teacher_checkpoint, "teacher_checkpoint too")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "more than 0, at most 1")
        self._check("crop_pct", 0 < self.crop_pct <= 1, "more than 0, at most 1")
        low, high = self.cutmix_minmax or (0, 1)
        self._check("cutmix_minmax", 0 <= low < high <= 1, "two shares of a side, 0 <= low < high <= 1")
        self._check("bce_target_thresh", self.bce_target_thresh is None or self.bce_loss, "bce_loss with it")
        self._check("aa", self.aa is None or RAND_AUGMENT.fullmatch(self.aa), "timm's rand-m9-mstd0.5-inc1 or the like")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


def build_task(config: FinetuneConfig, world: "World", checkpoint: Path | None, images: "ImageIndex") -> "Task":
    """A classifier, its loss and its validation.

    Args:
        config: of the run.
        world: this process.
        checkpoint: of this run, to take the weights from; None: `config.checkpoint`'s, which is read at the beginning
            of a run alone.
        images: to train on.

    Raises:
        InputError: a model or checkpoint that can't be used, images without classes, or validation images that don't
            fit them.
    """
    from dataclasses import replace

    import torch
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    from tinymim_fast.models.attention import use_attention
    from tinymim_fast.models.classifier import (
        Classification,
        create_classifier,
        freeze_parts,
        layer_scales,
        restore_classifier,
    )
    from tinymim_fast.models.vit import keep_batch_norm_fp32, whole_blocks
    from tinymim_fast.tasks.classifying import batch_augment, find_validation_images, validate_on, with_teacher
    from tinymim_fast.tasks.distill import which_teacher
    from tinymim_fast.training.task import Task, saved_buffers, without_prefix

    _check_batches(config, world)
    class_names = _class_names(config, images)
    validation_images = find_validation_images(config, world, images)
    if checkpoint is not None:
        with flags(source="output_dir"):
            vit, info = restore_classifier(checkpoint, drop_path=config.drop_path)
    else:
        with flags(source="checkpoint", key="checkpoint_key", distilled="teacher_checkpoint"):
            vit, info = create_classifier(_wanted(config, len(class_names)))
    keep_batch_norm_fp32(vit)
    with flags(num_blocks="freeze_blocks"):
        freeze_parts(vit, num_blocks=config.freeze_blocks, all_but_head=config.linear_probe)
    if config.mixes:
        criterion: nn.Module = SoftTargetCrossEntropy()
    elif config.smoothing:
        criterion = LabelSmoothingCrossEntropy(config.smoothing)
    else:
        criterion = torch.nn.CrossEntropyLoss()
    if config.bce_loss:
        criterion = BinaryCrossEntropy(0.0 if config.mixes else config.smoothing, config.bce_target_thresh)
    parts, kind, kept = ("loss",), {}, {}

    def prepare(views: "Views") -> "Views":
        return views

    if config.teacher_checkpoint is not None:
        parts, prepare = ("loss", "task_loss", "distill_loss"), with_teacher(config, world, class_names)
        vit.set_distilled_training(True)
        kept["teacher_checkpoint"] = which_teacher(config)
        kind = {"alpha": config.distillation_alpha, "kind": config.distillation_type, "tau": config.distillation_tau}
    model = Classification(vit, criterion, **kind)
    initial = {name: tensor.detach().clone() for name, tensor in vit.state_dict().items()}
    validation = validate_on(config, world, vit, validation_images)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    attention = use_attention(model, config.attention, world.device, dtype, gradients=True)
    logger.info("classifier: %d classes, %s, attention %s", len(class_names), str(dtype)[6:], attention)

    def weights(trained: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {**initial, **saved_buffers(vit, initial), **without_prefix(trained, PREFIX)}

    return Task(
        model=model,
        prepare=prepare,
        augment=batch_augment(config, world, len(class_names)),
        parts=parts,
        view=_view(config, world),
        weights=weights,
        trained=lambda saved: {PREFIX + name: tensor for name, tensor in saved.items()},
        info=replace(info, recipe=to_dict(config), class_names=list(class_names)),
        lr_scale={PREFIX + name: scale for name, scale in layer_scales(vit, config.layer_decay).items()},
        no_weight_decay=frozenset(PREFIX + name for name in vit.no_weight_decay()),
        ema_decay=config.model_ema_decay if config.model_ema else None,
        ema_warmup=config.model_ema_warmup,
        validation=validation,
        kept=kept,
        regions=whole_blocks(model),
    )


def _wanted(config: FinetuneConfig, num_classes: int) -> "Classifier":
    from tinymim_fast.models.classifier import Classifier

    return Classifier(
        source=config.checkpoint,
        model=config.model,
        model_kwargs=config.model_kwargs,
        key=config.checkpoint_key,
        num_classes=num_classes,
        img_size=config.img_size,
        global_pool=config.global_pool,
        num_heads=config.num_heads,
        drop_path=config.drop_path,
        head_init_std=config.head_init_std,
        distilled=config.teacher_checkpoint is not None,
        pre_head_dim=config.pre_head_dim,
    )


def _check_batches(config: FinetuneConfig, world: "World") -> None:
    """Mixup mixes the first image of a batch with the last, the second with the last but one, and so on."""
    size = config.batch_plan(world.world_size).micro_batch_size
    if config.mixes and size % 2:
        raise InputError(
            f"got {size} images at once, and mixup and cutmix want an even number; change train_batch_size or the "
            "accumulation, or set both to 0",
            argument="train_micro_batch_size_per_gpu",
        )


def _class_names(config: FinetuneConfig, images: "ImageIndex") -> tuple[str, ...]:
    names = images.class_names
    if not images.is_labelled or len(names) < 2:
        found = f"one class, {names[0]}" if images.is_labelled and names else "no classes"
        raise InputError(
            f"{config.data_path}: its images have {found}; want two or more, in folders "
            "train/<class>/ or as shards' labels",
            argument="data_path",
        )
    if config.num_classes not in (None, len(names)):
        raise InputError(
            f"got {config.num_classes}, and {config.data_path} holds {len(names)} classes; leave it out, or choose "
            "other images",
            argument="num_classes",
        )
    return names


def _view(config: FinetuneConfig, world: "World") -> "TrainView":
    from dataclasses import replace

    from tinymim_fast.training.task import train_view

    view = train_view(config, world, color_jitter=config.color_jitter or None)
    return replace(view, rand_augment=config.aa, clean=False, labels=True, repeats=max(1, config.aug_repeats))
