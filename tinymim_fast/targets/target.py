"""What every target is: a loss between tensors of the student's places and of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models.taps import Place
from tinymim_fast.targets.settings import BlockSettings, TargetSettings


class Target(nn.Module):
    """One thing to distil.

    `forward(of_student, of_teacher)` takes the tensors of `places_s` and of `places_t`, in their order, and gives
    losses by name, "loss" and each of `parts`, fp32 scalars. What it trains, a layer on the student's side, is in
    checkpoints and not in exports.

    Args:
        settings: what the recipe says, blocks and heads filled in.
        places_s: of the student.
        places_t: of the teacher.

    Attributes:
        cut: how many tokens before the patches it leaves out, of the student and of the teacher.
    """

    cut: tuple[int, int] = (0, 0)
    parts: tuple[str, ...] = ()

    def __init__(self, settings: TargetSettings, places_s: Sequence[Place], places_t: Sequence[Place]):
        super().__init__()
        self.name = settings.name
        self.weight = float(settings.weight)
        self.places_s, self.places_t = tuple(places_s), tuple(places_t)

    def try_on(self, device: torch.device, dtype_s: torch.dtype, dtype_t: torch.dtype) -> None:
        """Run what may not run here, on one token; nothing by default.

        Raises:
            ValueError: it does not run here; says why.
        """


def block_pairs(settings: BlockSettings) -> list[tuple[int, int]]:
    """(student's block, teacher's block), one of each or as many of both."""
    of_student, of_teacher = (
        blocks if isinstance(blocks, tuple) else (blocks,)
        for blocks in (settings.student_block, settings.teacher_block)
    )
    num = max(len(of_student), len(of_teacher))
    of_student, of_teacher = (blocks * num if len(blocks) == 1 else blocks for blocks in (of_student, of_teacher))
    return list(zip(of_student, of_teacher, strict=True))


def pairs_at(
    at: str, settings: BlockSettings, student: VisionTransformer, teacher: VisionTransformer
) -> list[tuple[int | None, int | None]]:
    """`block_pairs`; of "final_norm", which lies behind all blocks, one pair of none.

    Raises:
        InputError: a model has no final norm; argument "place".
    """
    if at != "final_norm":
        return block_pairs(settings)
    check_places([at], "place", student=student, teacher=teacher)
    return [(None, None)]


def tokens_to_cut(student: VisionTransformer, teacher: VisionTransformer, tokens: str) -> tuple[int, int]:
    """How many tokens before the patches can't be compared, of student and teacher.

    Args:
        student, teacher: their shapes are read.
        tokens: "all" compares all, "patches" the patches alone, "auto" all where both models have the same class and
            register tokens, else the patches.

    Raises:
        InputError: another number of tokens, or of patches; argument "model_kwargs".
    """
    prefixes = student.num_prefix_tokens, teacher.num_prefix_tokens
    alike = prefixes[0] == prefixes[1] and student.has_class_token == teacher.has_class_token
    if tokens == "patches" or (tokens == "auto" and not alike):
        check_patches(student, teacher)
        return prefixes
    check_tokens(student, teacher)
    return 0, 0


def check_tokens(student: VisionTransformer, teacher: VisionTransformer) -> None:
    """Refuse models whose tokens don't correspond.

    Raises:
        InputError: another number of tokens; argument "model_kwargs".
    """
    (tokens_s, prefix_s), (tokens_t, prefix_t) = (
        (vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.num_prefix_tokens) for vit in (student, teacher)
    )
    if tokens_s != tokens_t:
        raise InputError(
            f"the student has {tokens_s} tokens, {prefix_s} of them before the patches, the teacher {tokens_t} and "
            f"{prefix_t}; relations need the same: match patch_size, class_token and reg_tokens, or let tokens be "
            "patches",
            argument="model_kwargs",
        )


def check_patches(student: VisionTransformer, teacher: VisionTransformer) -> None:
    """Refuse models whose patches don't correspond.

    Raises:
        InputError: another number of patches; argument "model_kwargs".
    """
    patches_s, patches_t = student.patch_embed.num_patches, teacher.patch_embed.num_patches
    if patches_s != patches_t:
        raise InputError(
            f"the student has {patches_s} patches, the teacher {patches_t}; match patch_size", argument="model_kwargs"
        )


def check_places(places: Sequence[str], argument: str, **models: VisionTransformer) -> None:
    """Refuse models that lack a place behind their blocks.

    Args:
        places: of "final_norm", "class_token" and "logits".
        argument: the settings' key to name.
        **models: "student" and "teacher", those that need the places.

    Raises:
        InputError: names the model and what it lacks.
    """
    for who, vit in models.items():
        if "class_token" in places and not vit.has_class_token:
            raise InputError(f"the {who} has no class token; give one that has, or another target", argument=argument)
        if "logits" in places and isinstance(vit.head, nn.Identity):
            raise InputError(
                f"the {who} has no classifier; give a file that has one, or for timm's weights "
                "teacher_model_kwargs {num_classes: 1000}",
                argument=argument,
            )
        if "logits" not in places and isinstance(vit.norm, nn.Identity):
            raise InputError(
                f"the {who} has no norm behind its last block, where the target lies; want block_output or the like",
                argument=argument,
            )


def complete_blocks(
    settings: BlockSettings, student: VisionTransformer, teacher: VisionTransformer, target_block: int
) -> BlockSettings:
    """The same settings with the blocks that they leave open.

    Args:
        settings: as the recipe says them.
        student, teacher: their numbers of blocks are read.
        target_block: of the teacher, where they say none.

    Raises:
        InputError: a block that a model doesn't have; argument "teacher_block" or "student_block".
    """
    teacher_block = settings.teacher_block or target_block
    student_block = settings.student_block or len(student.blocks)
    for who, blocks, vit in (("teacher", teacher_block, teacher), ("student", student_block, student)):
        for block in blocks if isinstance(blocks, tuple) else (blocks,):
            if not 1 <= block <= len(vit.blocks):
                raise InputError(
                    f"got {block}, want 1 to {len(vit.blocks)}, the number of the {who}'s blocks",
                    argument=f"{who}_block",
                )
    return replace(settings, teacher_block=teacher_block, student_block=student_block)


def linear(width_s: int, width_t: int) -> nn.Linear:
    """A layer from the student's width to the teacher's, initialised as MAE does."""
    layer = nn.Linear(width_s, width_t)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mean_of(losses: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By name, the mean over block pairs; of one pair itself."""
    if len(losses) == 1:
        return losses[0]
    return {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
