"""Token relations as the target: the paper's method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.profiler import record_function

from tinymim_fast.errors import InputError
from tinymim_fast.kernels import RelationLoss
from tinymim_fast.models.taps import Taps


class RelationDistiller(nn.Module):
    """Student and relation loss as one module, which is what the engine trains.

    Args:
        student: tapped at one qkv projection, its last block's.
        teacher: tapped at one qkv projection, the target block's; only its shape is read here.
        relation_heads: heads of the relations; must divide both widths.
        relations: any of qk, vv, qq, kk.
        weights: one a relation; default 1 each.
        backend: of the loss.

    Raises:
        InputError: heads that don't divide, or another number of tokens.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        relation_heads: int,
        relations: Sequence[str],
        weights: Sequence[float] | None,
        backend: str,
    ):
        super().__init__()
        (self.place,), (place_t,) = student.places, teacher.places
        width_s, width_t = student.widths[self.place] // 3, teacher.widths[place_t] // 3
        for who, width in (("student", width_s), ("teacher", width_t)):
            if width % relation_heads:
                raise InputError(
                    f"got {relation_heads}, want a number that divides the {who}'s width {width} (both widths: student "
                    f"{width_s}, teacher {width_t})",
                    argument="relation_heads",
                )
        if student.num_tokens != teacher.num_tokens:
            raise InputError(
                f"the student has {student.num_tokens} tokens, {student.num_prefix_tokens} of them before the patches, "
                f"the teacher {teacher.num_tokens} and {teacher.num_prefix_tokens}; relations need the same: match "
                "patch_size, class_token and reg_tokens",
                argument="student_model_kwargs",
            )
        self.student = student
        self.loss = RelationLoss(relation_heads, relations=tuple(relations), weights=weights, backend=backend)

    def forward(self, images: torch.Tensor, qkv_t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses by name, "loss" the weighted sum, each an fp32 scalar.

        Args:
            images: student view, (B, 3, H, W).
            qkv_t: the teacher's packed projection of the teacher view, (B, N, 3 C_t).
        """
        with record_function("student"):
            qkv_s = self.student(images)[self.place]
        with record_function("loss"):
            return self.loss(qkv_s, qkv_t)
