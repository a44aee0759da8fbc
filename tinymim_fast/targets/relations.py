"""Token relations as the target: the paper's method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.kernels import RelationLoss, relation_kl
from tinymim_fast.kernels.checks import RELATIONS as FUSED
from tinymim_fast.kernels.reference import projections
from tinymim_fast.models.taps import Place
from tinymim_fast.targets.gram import relation_mse
from tinymim_fast.targets.settings import Relations
from tinymim_fast.targets.target import Target, block_pairs, mean_of, tokens_to_cut


class RelationTarget(Target):
    """Relations of packed projections, of one pair of blocks or the mean over several.

    With softmax `mean over b, h, i of KL(R_t || R_s)`, R = softmax(x y^T / sqrt(D)), see `kernels.relation_loss`;
    without, see `gram.relation_mse`. x and y are any two of q, k and v.

    Args:
        settings: with blocks and heads.
        student, teacher: their shapes are read.
        backend: of the loss with softmax.
        tokens: which are related, see `tokens_to_cut`.

    Raises:
        InputError: heads that don't divide a width, or another number of tokens.
    """

    def __init__(
        self,
        settings: Relations,
        student: VisionTransformer,
        teacher: VisionTransformer,
        backend: str,
        tokens: str = "all",
    ):
        pairs = block_pairs(settings)
        places_s, places_t = ([Place("qkv", block) for block in blocks] for blocks in zip(*pairs, strict=True))
        super().__init__(settings, places_s, places_t)
        self.widths = [
            tuple(vit.blocks[block - 1].attn.qkv.out_features // 3 for vit, block in zip((student, teacher), pair))
            for pair in pairs
        ]
        for width_s, width_t in self.widths:
            for who, width in (("student", width_s), ("teacher", width_t)):
                if width % settings.heads:
                    raise InputError(
                        f"got {settings.heads}, want a number that divides the {who}'s width {width} (both widths: "
                        f"student {width_s}, teacher {width_t})",
                        argument="heads",
                    )
        self.cut = tokens_to_cut(student, teacher, tokens)
        self.settings, self.backend = settings, backend
        self.loss = relation_losses(settings.heads, settings.weight_of, softmax=settings.softmax, backend=backend)
        self.parts = settings.names if settings.name is None or len(settings.names) > 1 else ()

    def forward(
        self, of_student: tuple[torch.Tensor, ...], of_teacher: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """Weighted sum and each relation's loss, from packed projections (B, N, 3 C) of each pair."""
        return mean_of([self.loss(qkv_s, qkv_t) for qkv_s, qkv_t in zip(of_student, of_teacher, strict=True)])

    def try_on(self, device: torch.device, dtype_s: torch.dtype, dtype_t: torch.dtype) -> None:
        """The loss of one token's zeros."""
        for widths in set(self.widths):
            tokens = zip(widths, (dtype_s, dtype_t), strict=True)
            self.loss(*(torch.zeros(1, 1, 3 * width, dtype=dtype, device=device) for width, dtype in tokens))


def relation_losses(
    heads: int, weights: Mapping[str, float], *, softmax: bool, backend: str
) -> RelationLoss | AnyRelations:
    """The module that computes these: fused where all of them are of `FUSED`."""
    if softmax and set(weights) <= set(FUSED):
        return RelationLoss(heads, relations=tuple(weights), weights=weights, backend=backend)
    return AnyRelations(heads, weights, softmax=softmax, backend=backend)


class AnyRelations(torch.nn.Module):
    """Any of the nine relations, one by one, with softmax or without; takes and gives what `RelationLoss` does.

    Args:
        heads: of the relations; must divide both widths.
        weights: by relation, in "loss".
        softmax: else the scaled products are compared.
        backend: of the loss with softmax.
    """

    def __init__(self, heads: int, weights: Mapping[str, float], *, softmax: bool, backend: str):
        super().__init__()
        self.heads, self.weights, self.softmax, self.backend = heads, dict(weights), softmax, backend

    def forward(self, qkv_s: torch.Tensor, qkv_t: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"loss": the weighted sum, and each relation's loss}, from (B, N, 3 C_s) and (B, N, 3 C_t)."""
        of_student, of_teacher = projections(qkv_s, self.heads), projections(qkv_t, self.heads)
        losses = {}
        for x, y in self.weights:
            pair = of_student[x], of_student[y], of_teacher[x], of_teacher[y]
            losses[x + y] = relation_kl(*pair, backend=self.backend) if self.softmax else relation_mse(*pair)
        return {"loss": sum(weight * losses[name] for name, weight in self.weights.items()), **losses}
