"""Distillation: a frozen teacher's token relations, reproduced by a student."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tinymim_fast.config import RunConfig, to_dict
from tinymim_fast.errors import InputError, flags
from tinymim_fast.files import listed_checksums, sha256

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from tinymim_fast.data import ImageIndex
    from tinymim_fast.distributed import World
    from tinymim_fast.models.preprocessing import Preprocessing
    from tinymim_fast.models.taps import Taps
    from tinymim_fast.training.task import Task, Views

logger = logging.getLogger("tinymim_fast")
PREFIX = "student.model."  # of the student's weights under the engine


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """A distillation run: a frozen teacher's token relations, reproduced by a student.

    Args:
        teacher_checkpoint: an official MAE or TinyMIM `.pth`, a checkpoint or export of this package (folder or
            file), or `timm:NAME` for timm's own weights.
        student_model: timm name of a VisionTransformer.
        student_model_kwargs: passed to `timm.create_model`, e.g. `{"reg_tokens": 4}`; `num_heads` may be a list, one
            number for each block.
        student_pos_embed: "sincos", fixed as in MAE, or "learn".
        teacher_model: timm name of the teacher; read from the checkpoint where that says it.
        teacher_model_kwargs: passed to `timm.create_model`; `num_heads` may be a list, one number for each block.
        teacher_key: of several models in the teacher's file, the one below this key, e.g. "teacher".
        teacher_mean: per-channel mean of the teacher's view, of 1; default the one that it was trained with, where its
            file says it, else `mean`.
        teacher_std: per-channel standard deviation of the teacher's view; default likewise.
        teacher_precision: "fp32", "bf16", "int8" or "fp8" (linear layers alone), or "auto": bf16 wherever the device
            has it, whatever the student's.
        target_block: the teacher's block, 1-based; default 18 for 24 blocks (ViT-L), else the last.
        relation_heads: heads of the relations; must divide both widths; default the teacher's.
        relations: any of qk, vv, qq, kk.
        relation_weights: one weight a relation; default 1 each.
        drop_path: the student's, the same in every block before the last.
        color_jitter: strength of brightness, contrast and saturation jitter of the student's view.
        loss_backend: "auto", "triton", "chunked" or "reference".
    """

    FREE_ON_RESUME: ClassVar[frozenset[str]] = RunConfig.FREE_ON_RESUME | {"loss_backend", "teacher_checkpoint"}

    teacher_checkpoint: str
    student_model: str = "vit_base_patch16_224"
    student_model_kwargs: dict[str, Any] = field(default_factory=dict)
    student_pos_embed: Literal["sincos", "learn"] = "sincos"
    teacher_model: str | None = None
    teacher_model_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_key: str | None = None
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    teacher_precision: Literal["auto", "fp32", "bf16", "int8", "fp8"] = "auto"
    target_block: int | None = None
    relation_heads: int | None = None
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    relation_weights: tuple[float, ...] | None = None
    drop_path: float = 0.1
    color_jitter: float = 0.4
    loss_backend: Literal["auto", "triton", "chunked", "reference"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("relations", 0 < len(self.relations) == len(set(self.relations)), "one or more, none twice")
        weights = self.relation_weights
        self._check(
            "relation_weights",
            weights is None or (len(weights) == len(self.relations) and min(weights) >= 0 < max(weights)),
            f"{len(self.relations)} weights, one for each of {', '.join(self.relations)}, 0 or more and not all 0",
        )
        self._check("teacher_std", self.teacher_std is None or min(self.teacher_std) > 0, "three numbers above 0")
        self._check("relation_heads", self.relation_heads is None or self.relation_heads > 0, "more than 0")
        self._check("target_block", self.target_block is None or self.target_block > 0, "1 or more")
        self._check("drop_path", 0 <= self.drop_path < 1, "a probability below 1")
        self._check("color_jitter", 0 <= self.color_jitter <= 1, "0 to 1")


def build_teacher(
    config: DistillConfig, began: "Preprocessing | None" = None
) -> "tuple[Taps, int, int, Preprocessing]":
    """The teacher up to its target block, that block's number, the heads of its relations, and how its view is made.

    Args:
        config: of the run.
        began: how its view was made so far, of a run that goes on.

    Raises:
        InputError: no such checkpoint, or no such block.
    """
    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.preprocessing import Preprocessing

    names = {"source": "checkpoint", "model": "model", "model_kwargs": "model_kwargs", "key": "key"}
    with flags(**{name: f"teacher_{field}" for name, field in names.items()}):
        vit, info = load_encoder(
            config.teacher_checkpoint,
            model=config.teacher_model,
            model_kwargs=config.teacher_model_kwargs,
            img_size=config.img_size,
            key=config.teacher_key,
        )
    teacher, block, heads = tap_teacher(config, vit, info.head_layout)
    logger.info("teacher: %s, block %d, %d relation heads", info.architecture, block, heads)
    view = began or Preprocessing(
        mean=config.teacher_mean or (info.expects.mean if info.expects else config.mean),
        std=config.teacher_std or (info.expects.std if info.expects else config.std),
    )
    if info.expects and info.expects.interpolation not in ("random", config.interpolation):
        logger.warning(
            "the teacher was trained on images resized by %s, here by %s: interpolation sets it",
            info.expects.interpolation,
            config.interpolation,
        )
    if info.expects:
        own = not info.expects.differences(view.mean, view.std)
        other = info.expects.differences(*((config.mean, config.std) if own else (view.mean, view.std)))
        if other:
            how = "; its view has its own, the student's this" if own else ""
            logger.warning("the teacher was trained on images of another %s%s", "; of another ".join(other), how)
    return teacher, block, heads, view


def tap_teacher(config: DistillConfig, vit: "VisionTransformer", layout: Mapping[str, Any]) -> "tuple[Taps, int, int]":
    """A teacher up to its target block, that block's number, and the heads of its relations.

    Args:
        config: of the run.
        vit: the whole teacher.
        layout: its `ModelInfo.head_layout`.

    Raises:
        InputError: no such block.
    """
    from tinymim_fast.models.taps import Place, Taps
    from tinymim_fast.models.vit import default_target_block

    block = config.target_block or default_target_block(len(vit.blocks))
    with flags(block="target_block"):
        teacher = Taps(vit, [Place("qkv", block)])
    # A student of this package reproduced relations of so many heads in its last block; as a teacher it offers those.
    return teacher, block, config.relation_heads or layout.get("relation_heads") or vit.blocks[block - 1].attn.num_heads


def which_teacher(config: DistillConfig) -> dict[str, Any]:
    """What tells this teacher from others, wherever its file lies: the checksum, and a name for readers.

    A run's output folder means its newest checkpoint, which another day is another teacher.

    Raises:
        InputError: no such file, or not what was saved.
    """
    from tinymim_fast.models.checkpoints import find_weights

    if config.teacher_checkpoint.startswith("timm:"):
        return {"name": config.teacher_checkpoint}
    with flags(source="teacher_checkpoint"):
        path = find_weights(Path(config.teacher_checkpoint))
    digest = sha256(path)
    try:
        saved = listed_checksums(path.parent).get(path.name, digest)
    except (OSError, ValueError):
        saved = None
    if saved != digest:
        raise InputError(
            f"{path} is not what was saved: its checksum differs; take another checkpoint",
            argument="teacher_checkpoint",
        )
    return {"name": path.parent.name if path.parent.name.startswith("step_") else path.name, "sha256": digest}


def build_task(
    config: DistillConfig, world: "World", checkpoint: Path | None, images: "ImageIndex | None" = None
) -> "Task":
    """Student, teacher and relation loss.

    Args:
        config: of the run.
        world: this process; the teacher goes to its device.
        checkpoint: to take the student's weights from; None for fresh ones, from torch's random numbers.
        images: to train on; no task here depends on them.

    Raises:
        InputError: a model or checkpoint that can't be used, or models that don't fit each other.
    """
    import torch
    from torch.profiler import record_function

    from tinymim_fast.models.attention import use_attention
    from tinymim_fast.models.checkpoints import restore
    from tinymim_fast.models.model_info import ModelInfo
    from tinymim_fast.models.precision import choose_precision, lower_precision
    from tinymim_fast.models.taps import Place, Taps
    from tinymim_fast.models.vit import (
        create_vit,
        head_layout,
        init_mae_style,
        keep_batch_norm_fp32,
        set_constant_drop_path,
        whole_blocks,
    )
    from tinymim_fast.targets.relations import RelationDistiller
    from tinymim_fast.training.task import Frozen, Task, saved_buffers, train_view, without_prefix

    names = {"model": "student_model", "model_kwargs": "student_model_kwargs", "pos_embed": "student_pos_embed"}
    with flags(**names, source="output_dir"):
        student = create_vit(config.student_model, img_size=config.img_size, **config.student_model_kwargs)
        init_mae_style(student, pos_embed=config.student_pos_embed)
        set_constant_drop_path(student, config.drop_path)
        keep_batch_norm_fp32(student)
        began = restore(student, checkpoint) if checkpoint is not None else None
    layout = head_layout(student)
    initial = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}

    teacher, block, heads, view_t = build_teacher(config, began.teacher_expects if began else None)
    taps = Taps(student, [Place("qkv", len(student.blocks))])
    distiller = RelationDistiller(
        taps,
        teacher,
        relation_heads=heads,
        relations=config.relations,
        weights=config.relation_weights,
        backend=config.loss_backend,
    )
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    with flags(precision="teacher_precision"):
        precision = choose_precision(config.teacher_precision, world.device)
    dtype_t = lower_precision(teacher, precision, world.device)
    logger.info("teacher: %s, attention %s", precision, use_attention(teacher, config.attention, world.device, dtype_t))
    attention = use_attention(taps, config.attention, world.device, dtype, gradients=True)
    logger.info("student: %s, attention %s", "bf16" if config.bf16 else "fp32", attention)
    try:  # on one token: a backend that can't run here says so now, not after the set-up
        tokens = [(taps, dtype), (teacher, dtype_t)]
        distiller.loss(*(torch.zeros(1, 1, *m.widths.values(), dtype=d, device=world.device) for m, d in tokens))
    except ValueError as error:
        raise InputError(f"got {config.loss_backend}: {error}", argument="loss_backend") from error

    def prepare(views: "Views") -> "Views":
        teacher_view, student_view = views
        with record_function("teacher"):
            (qkv_t,) = teacher(teacher_view.to(dtype_t)).values()
        return student_view, qkv_t

    def weights(trained: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        # What the loss can't reach is not in the engine: it keeps its initial fp32 values, whatever ZeRO and AdamW do.
        return {**initial, **saved_buffers(taps.model, initial), **without_prefix(trained, PREFIX)}

    return Task(
        model=distiller,
        prepare=prepare,
        parts=("loss", *config.relations),
        view=train_view(
            config, world, color_jitter=config.color_jitter, teacher_mean=view_t.mean, teacher_std=view_t.std
        ),
        weights=weights,
        info=ModelInfo(
            architecture=config.student_model,
            model_kwargs={**config.student_model_kwargs, "img_size": config.img_size},
            kind="tinymim",
            head_layout={**layout, "relation_heads": heads, "teacher_block": block},
            recipe=to_dict(config),
            teacher_preprocessing=asdict(view_t),
        ),
        kept={"teacher_checkpoint": which_teacher(config)},
        frozen=Frozen(
            teacher,
            dtype_t,
            {"teacher_precision": precision, "attention": config.attention, "compile": config.compile},
        ),
        regions=(*whole_blocks(taps), *(whole_blocks(teacher) if precision != "int8" else ())),
    )
