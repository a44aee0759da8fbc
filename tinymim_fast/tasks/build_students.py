"""A student as a recipe says it, built: model, targets, and what its part of a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.config import to_dict
from tinymim_fast.errors import flags
from tinymim_fast.models.checkpoints import restore
from tinymim_fast.models.model_info import ModelInfo
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
    teacher_info: ModelInfo,
) -> list[TargetSettings]:
    """A student's targets with the blocks and heads that the recipe leaves open.

    Args:
        student: what the recipe says, in the place `where`.
        mask_ratio: of the run.
        vit: the student as built.
        teacher, teacher_info: from `load_teacher`.

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
            offered = teacher_info.head_layout.get("relation_heads")
            first = settings.teacher_block[0] if isinstance(settings.teacher_block, tuple) else settings.teacher_block
            heads = student.relation_heads or offered or teacher.blocks[first - 1].attn.num_heads
            settings = replace(settings, heads=heads)
        completed.append(settings)
    return completed


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


def build_student(
    config: DistillConfig,
    where: str,
    student: StudentConfig,
    teacher: VisionTransformer,
    teacher_info: ModelInfo,
    num_visible: int | None,
    checkpoint: Path | None,
) -> BuiltStudent:
    """One of `config.each_student`, from the random numbers that it would have alone.

    Raises:
        InputError: see `build_task`.
    """
    torch.manual_seed(config.seed)
    saved = {}
    names = {key: f"{where}{key}" for key in FLAGS} if where else FLAGS
    with flags(**names, source="output_dir"):
        vit = create_vit(student.model, **{"img_size": config.img_size, **student.model_kwargs})
        init_mae_style(vit, pos_embed=student.pos_embed)
        set_constant_drop_path(vit, student.drop_path)
        keep_batch_norm_fp32(vit)
        if checkpoint is not None:
            saved = restore(vit, checkpoint, student=student.name)
        if num_visible is not None:
            check_patches(vit, teacher)
    initial = {name: tensor.detach().clone() for name, tensor in vit.state_dict().items()}

    completed = complete_targets(student, where, config.mask_ratio, vit, teacher, teacher_info)
    targets = []
    for number, settings in enumerate(completed):
        with flags(**_keys(settings, where, number)):
            targets.append(build_target(settings, vit, teacher, backend=config.loss_backend))
    with flags(name=f"{where}targets"):
        distiller = Distiller(vit, targets, num_visible=num_visible)
    if checkpoint is not None:
        with flags(source="output_dir"):
            distiller.restore(saved, checkpoint)

    layout = head_layout(vit)
    for settings in completed:
        if isinstance(settings, Relations):
            block = settings.teacher_block
            layout |= {
                "relation_heads": settings.heads,
                "teacher_block": block[0] if isinstance(block, tuple) else block,
            }
            logger.info("relations: teacher's block %s, %d relation heads", block, settings.heads)
            break
    info = {
        "architecture": student.model,
        "model_kwargs": {**student.model_kwargs, "img_size": config.img_size},
        "head_layout": layout,
    }
    return BuiltStudent(student.name, distiller, initial, info, student.lr_scale)


def info_of(config: DistillConfig, students: list[BuiltStudent]) -> ModelInfo:
    """What a checkpoint says of itself; of several students, of the first, and of each by its name."""
    by_name = {built.name: built.info for built in students if built.name is not None}
    return ModelInfo(kind="tinymim", recipe=to_dict(config), students=by_name, **students[0].info)
