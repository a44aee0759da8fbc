"""Distil a student ViT from a frozen teacher by token relations.

deepspeed tinymim_fast/train.py --config tinymim_fast/recipes/NAME.yaml --data-path DIR --teacher-checkpoint FILE \
    --output-dir DIR [--any-field-of-the-configuration VALUE]
"""

from __future__ import annotations

import os
import sys

# Before torch starts OpenMP: threads that spin while they wait take the cores from those that decode. A short spin was
# fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Started as a file, this folder is first on the path, and its modules are not top-level ones.
if __package__ in (None, ""):
    sys.path.pop(0)

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tinymim_fast.config import DistillConfig, to_dict
from tinymim_fast.distributed import World
from tinymim_fast.errors import InputError, flags
from tinymim_fast.models.checkpoints import ModelInfo, load_encoder, load_state, read_weights
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import (
    create_vit,
    default_target_block,
    freeze,
    head_layout,
    init_mae_style,
    set_constant_drop_path,
)
from tinymim_fast.targets.relations import RelationDistiller
from tinymim_fast.training import loop as training

logger = logging.getLogger("tinymim_fast")
PREFIX = "student.model."


FLAGS_S = {
    "model": "--student-model",
    "model_kwargs": "--student-model-kwargs",
    "source": "--output-dir",
    "pos_embed": "--student-pos-embed",
}
FLAGS_T = {
    "source": "--teacher-checkpoint",
    "model": "--teacher-model",
    "model_kwargs": "--teacher-model-kwargs",
    "block": "--target-block",
}
FLAGS = {"relation_heads": "--relation-heads", "student_model_kwargs": "--student-model-kwargs"}


def build_teacher(config: DistillConfig) -> tuple[Taps, int, int]:
    """The teacher up to its target block, that block's number, and the heads of its relations."""
    with flags(**FLAGS_T):
        vit, info = load_encoder(
            config.teacher_checkpoint,
            model=config.teacher_model,
            model_kwargs=config.teacher_model_kwargs,
            img_size=config.img_size,
        )
        block = config.target_block or default_target_block(len(vit.blocks))
        teacher = Taps(vit, [Place("qkv", block)])
    # A student of this package reproduced relations of so many heads in its last block; as a teacher it offers those.
    heads = config.relation_heads or info.head_layout.get("relation_heads") or vit.blocks[block - 1].attn.num_heads
    logger.info("teacher: %s, block %d, %d relation heads", info.architecture, block, heads)
    return teacher, block, heads


def build_task(config: DistillConfig, world: World, checkpoint: Path | None) -> training.Task:
    with flags(**FLAGS_S):
        student = create_vit(config.student_model, img_size=config.img_size, **config.student_model_kwargs)
        init_mae_style(student, pos_embed=config.student_pos_embed)
        set_constant_drop_path(student, config.drop_path)
        if checkpoint is not None:
            load_state(student, read_weights(checkpoint)[0], source=str(checkpoint), name=config.student_model)
    layout = head_layout(student)
    initial = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}

    teacher, block, heads = build_teacher(config)
    taps = Taps(student, [Place("qkv", len(student.blocks))])
    with flags(**FLAGS):
        distiller = RelationDistiller(
            taps,
            teacher,
            relation_heads=heads,
            relations=config.relations,
            weights=config.relation_weights,
            backend=config.loss_backend,
        )
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    freeze(teacher, dtype, world.device)
    try:  # on one token: a backend that can't run here says so now, not after the set-up
        widths = [*taps.widths.values(), *teacher.widths.values()]
        distiller.loss(*(torch.zeros(1, 1, width, dtype=dtype, device=world.device) for width in widths))
    except ValueError as error:
        raise InputError(f"--loss-backend {config.loss_backend}: {error}") from error

    def prepare(views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        teacher_view, student_view = views
        (qkv_t,) = teacher(teacher_view).values()
        return student_view, qkv_t

    return training.Task(
        model=distiller,
        prepare=prepare,
        parts=("loss", *config.relations),
        views=2,
        color_jitter=config.color_jitter,
        # What the loss can't reach is not in the engine: it keeps its initial fp32 values, whatever ZeRO and AdamW do.
        weights=lambda trained: {**initial, **{name.removeprefix(PREFIX): t for name, t in trained.items()}},
        info=ModelInfo(
            architecture=config.student_model,
            model_kwargs={**config.student_model_kwargs, "img_size": config.img_size},
            kind="tinymim",
            head_layout={**layout, "relation_heads": heads, "teacher_block": block},
            recipe=to_dict(config),
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(DistillConfig, build_task, argv, "train.py")


if __name__ == "__main__":
    sys.exit(main())
