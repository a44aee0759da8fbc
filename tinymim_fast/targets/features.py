"""Features as the target: smooth L1 against the teacher's, layer-normed, behind one linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tinymim_fast.models.taps import Place
from tinymim_fast.targets.settings import Features
from tinymim_fast.targets.target import Target, linear, pairs_at, tokens_to_cut

PLACES = {"block_output": "output", "q": "qkv", "k": "qkv", "v": "qkv"}  # of settings.FEATURE_PLACES, in taps


class FeatureTarget(Target):
    """Features of the same place in both models, of one pair of blocks or the mean over several.

    `mean over b, i, c of smooth_l1(W f_s + b, layer_norm(f_t); beta)`, W and b trained, layer_norm without affine
    weights. Of the packed projection, q, k and v each have their own W and their own layer_norm.

    Args:
        settings: with blocks.
        student, teacher: their shapes are read.
        tokens: which are compared, see `tokens_to_cut`.

    Raises:
        InputError: another number of tokens, or no final norm.

    Source: TinyMIM, arXiv 2301.01296, appendix; the target's normalisation is data2vec's (arXiv 2202.03555).
    """

    def __init__(self, settings: Features, student: VisionTransformer, teacher: VisionTransformer, tokens: str = "all"):
        at = PLACES.get(settings.place, settings.place)
        pairs = pairs_at(at, settings, student, teacher)
        places_s, places_t = (
            [Place(at, block, settings.after_residual) for block in blocks] for blocks in zip(*pairs, strict=True)
        )
        super().__init__(settings, places_s, places_t)
        self.cut = tokens_to_cut(student, teacher, tokens)
        self.beta = settings.beta
        # which thirds of the packed projection; None: the feature is whole
        self.thirds = ["qkv".index(letter) for letter in settings.place] if at == "qkv" else [None]
        widths = [
            tuple(
                vit.embed_dim if at != "qkv" else vit.blocks[block - 1].attn.qkv.out_features // 3
                for vit, block in zip((student, teacher), pair)
            )
            for pair in pairs
        ]
        self.projections = nn.ModuleList(linear(*pair) for pair in widths for _ in self.thirds)

    def forward(
        self, of_student: tuple[torch.Tensor, ...], of_teacher: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """{"loss": fp32 scalar} from features (B, N, C), or packed projections (B, N, 3 C), of each pair."""
        pairs = [
            (_third(f_s, third), _third(f_t, third))
            for f_s, f_t in zip(of_student, of_teacher, strict=True)
            for third in self.thirds
        ]
        losses = [
            feature_loss(projection(f_s), f_t, self.beta)
            for projection, (f_s, f_t) in zip(self.projections, pairs, strict=True)
        ]
        return {"loss": sum(losses) / len(losses)}


def feature_loss(projected: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean smooth L1 against the layer-normed target, fp32 (fp64 of fp64), from two of one shape (..., C)."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    target = target.to(dtype)
    return F.smooth_l1_loss(projected.to(dtype), F.layer_norm(target, target.shape[-1:]), beta=beta)


def _third(features: torch.Tensor, third: int | None) -> torch.Tensor:
    return features if third is None else features.chunk(3, dim=-1)[third]
