"""A student as a recipe says it, built: model, targets, and what its part of a checkpoint holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.config import to_dict
from tinymim_fast.errors import InputError, flags
from tinymim_fast.models.checkpoints import restore
from tinymim_fast.models.masking import num_visible
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.models.vit import (
    create_vit,
    default_target_block,
    head_layout,
    init_mae_style,
    keep_batch_norm_fp32,
    set_constant_drop_path,
)
from tinymim_fast.targets.distiller import Distiller, build_target
from tinymim_fast.targets.settings import BlockSettings, Relations, TargetSettings
from tinymim_fast.targets.target import check_patches, complete_blocks
from tinymim_fast.tasks.students import FLAGS, StudentConfig, targets_of
from tinymim_fast.training.task import saved_buffers, without_prefix

if TYPE_CHECKING:
    from tinymim_fast.tasks.distill import DistillConfig

logger = logging.getLogger("tinymim_fast")
PREFIX = "student.model."  # of a student's weights in its `Distiller`


def complete_targets(
    student: StudentConfig,
    where: str,
    mask_ratio: float,
    vit: VisionTransformer,
    teacher: VisionTransformer,
    layout: Mapping[str, Any],
) -> list[TargetSettings]:
    """A student's targets with the blocks and heads that the recipe leaves open.

    Args:
        student: what the recipe says, in the place `where`.
        mask_ratio: of the run.
        vit: the student as built.
        teacher: as built.
        layout: the teacher's `ModelInfo.head_layout`.

    Raises:
        InputError: a block that a model doesn't have; its argument is the key.
    """
    completed = []
    for number, settings in enumerate(targets_of(student, where, mask_ratio)):
        if isinstance(settings, BlockSettings):
            block = student.target_block or default_target_block(len(teacher.blocks))
            with flags(**_keys(settings, where, number)):
                settings = complete_blocks(settings, vit, teacher, block)
        if isinstance(settings, Relations) and settings.heads is None:
            # A student of this package reproduced relations of so many heads in its last block; as a teacher it offers
            # those.
            own = teacher.blocks[_first(settings.teacher_block) - 1].attn.num_heads
            settings = replace(settings, heads=student.relation_heads or layout.get("relation_heads") or own)
        completed.append(settings)
    return completed


def _first(block: int | tuple[int, ...]) -> int:
    return block[0] if isinstance(block, tuple) else block


def _keys(settings: TargetSettings, where: str, number: int) -> dict[str, str]:
    """What a target's keys, and those of its student, are called in the recipe, or as flags."""
    of_student = {"model_kwargs": f"{where}model_kwargs" if where else "student_model_kwargs"}
    if settings.name is None:
        of_flags = {"heads": "relation_heads", "teacher_block": "target_block"}
        return {name: where + flag for name, flag in of_flags.items()} | of_student
    names = ("kind", "name", *(f.name for f in fields(settings)))
    return {name: f"{where}targets[{number}].{name}" for name in names} | of_student


@dataclass(frozen=True)
class BuiltStudent:
    """A student ready to train.

    Args:
        name: of several; None for the only one.
        distiller: it and its targets.
        initial: its whole state as it began, in timm's names.
        info: what it is.
        lr_scale: factor on its learning rate.
    """

    name: str | None
    distiller: Distiller
    initial: dict[str, torch.Tensor]
    info: dict[str, Any]
    lr_scale: float

    def __str__(self) -> str:
        layout = self.info["head_layout"]
        relations = f", relations of block {layout['teacher_block']}" if "teacher_block" in layout else ""
        heads = f" in {layout['relation_heads']} heads" if relations else ""
        return f"{self.info['architecture']}, {', '.join(self.distiller.targets)}{relations}{heads}"

    @property
    def in_engine(self) -> str:
        """What stands before its names under the engine."""
        return "" if self.name is None else f"students.{self.name}."

    def scaled_names(self) -> list[str]:
        """Its parameters under the engine, where its learning rate is another."""
        return [self.in_engine + name for name, _ in self.distiller.named_parameters() if self.lr_scale != 1]

    def weights(self, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its part of a checkpoint: the model in timm's names, its targets' layers behind "targets."."""
        own = {n.removeprefix(self.in_engine): t for n, t in trained.items() if n.startswith(self.in_engine)}
        # What the loss can't reach is not in the engine: it keeps its initial fp32 values, whatever ZeRO and AdamW do.
        buffers = saved_buffers(self.distiller.student.model, self.initial)
        state = {**self.initial, **buffers, **without_prefix(own, PREFIX)}
        return state if self.name is None else {f"student.{self.name}.{name}": t for name, t in state.items()}


def build_students(
    config: DistillConfig, teacher: VisionTransformer, layout: Mapping[str, Any], checkpoint: Path | None = None
) -> list[BuiltStudent]:
    """The students of a run; under `torch.device("meta")` without memory, which shows whether they fit a teacher.

    Args:
        config: of the run.
        teacher: its shapes are read.
        layout: its `ModelInfo.head_layout`.
        checkpoint: to take the students' weights from; None for fresh ones, of each from the random numbers of the
            seed.

    Raises:
        InputError: a model or checkpoint that can't be used, or models that don't fit each other.
    """
    visible = num_visible(config.mask_ratio, teacher.patch_embed.num_patches) if config.mask_ratio else None
    return [
        _build_student(config, where, student, teacher, layout, visible, checkpoint)
        for where, student in config.each_student
    ]


def fitting_size(student: StudentConfig, img_size: int, teacher: VisionTransformer) -> int:
    """Side of a student's images, pixels, at which it has as many patches as the teacher.

    That is `img_size` where their patches have one size, and what the recipe says in model_kwargs where it says one.

    Args:
        student: what the recipe says.
        img_size: of the teacher's images.
        teacher: as built for them.

    Raises:
        InputError: no such model, argument "model", or "model_kwargs".
    """
    if "img_size" in student.model_kwargs:
        size = student.model_kwargs["img_size"]
        if type(size) is not int:
            raise InputError(f"got img_size {size}, want one number", argument="model_kwargs")
        return size
    with torch.device("meta"):
        rows, _ = create_vit(student.model, **{**student.model_kwargs, "img_size": img_size}).patch_embed.grid_size
    rows_t, _ = teacher.patch_embed.grid_size
    if rows == rows_t or not rows:
        return img_size
    size = img_size // rows * rows_t
    logger.info(
        "%s gets images of %d pixels: as many patches as the teacher, %d x %d", student.model, size, rows_t, rows_t
    )
    return size


def _build_student(
    config: DistillConfig,
    where: str,
    student: StudentConfig,
    teacher: VisionTransformer,
    layout: Mapping[str, Any],
    visible: int | None,
    checkpoint: Path | None,
) -> BuiltStudent:
    saved = {}
    names = {key: f"{where}{key}" for key in FLAGS} if where else FLAGS
    with flags(**names, source="output_dir"):
        kwargs = {**student.model_kwargs, "img_size": fitting_size(student, config.img_size, teacher)}
        torch.manual_seed(config.seed)
        vit = create_vit(student.model, **kwargs)
        init_mae_style(vit, pos_embed=student.pos_embed)
        set_constant_drop_path(vit, student.drop_path)
        keep_batch_norm_fp32(vit)
        if checkpoint is not None:
            saved = restore(vit, checkpoint, student=student.name)
        if visible is not None:
            check_patches(vit, teacher)
    initial = {name: tensor.detach().clone() for name, tensor in vit.state_dict().items()}

    completed = complete_targets(student, where, config.mask_ratio, vit, teacher, layout)
    targets = []
    for number, settings in enumerate(completed):
        with flags(**_keys(settings, where, number)):
            target = build_target(settings, vit, teacher, backend=config.loss_backend, tokens=config.tokens)
        targets.append(target)
    if config.tokens == "auto" and any(max(target.cut) for target in targets):
        logger.info(
            "%s and the teacher have other tokens before their patches, %d and %d: the patches alone are compared",
            student.model,
            vit.num_prefix_tokens,
            teacher.num_prefix_tokens,
        )
    with flags(name=f"{where}targets"):
        distiller = Distiller(vit, targets, num_visible=visible)
    if checkpoint is not None:
        with flags(source="output_dir"):
            distiller.restore(saved, checkpoint)

    own = head_layout(vit)
    relations = next((settings for settings in completed if isinstance(settings, Relations)), None)
    if relations is not None:
        own |= {"relation_heads": relations.heads, "teacher_block": _first(relations.teacher_block)}
    info = {
        "architecture": student.model,
        "model_kwargs": kwargs,
        "head_layout": own,
    }
    return BuiltStudent(student.name, distiller, initial, info, student.lr_scale)


def info_of(config: DistillConfig, students: list[BuiltStudent], view: Preprocessing) -> ModelInfo:
    """What a checkpoint says of itself; of several students, of the first, and of each by its name.

    Args:
        config: of the run.
        students: of it.
        view: how the teacher's images are made.
    """
    by_name = {built.name: built.info for built in students if built.name is not None}
    more = {"recipe": to_dict(config), "teacher_preprocessing": asdict(view), "students": by_name}
    return ModelInfo(kind="tinymim", **more, **students[0].info)


def one_size(students: list[BuiltStudent]) -> int:
    """Side of all students' images, pixels.

    Raises:
        InputError: they want different ones; argument "students".
    """
    sizes = {str(built.name): built.info["model_kwargs"]["img_size"] for built in students}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"want images of one size, and these are in pixels: {said}; match patch_size", argument="students"
        )
    return students[0].info["model_kwargs"]["img_size"]
