"""TinyMIM*-T's classifier: a distillation token, and a wider layer before the heads, 192 -> 1280."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn


class WiderHeads(VisionTransformerDistilled):
    """timm's DeiT with `pre_head`, LayerNorm, linear and GELU, on class and distillation token before their heads.

    `logits = head(GELU(W LN(x_cls) + b))`, and likewise of the distillation token with a head of its own. That
    LayerNorm stands in place of the final norm.

    Args:
        *args: of `VisionTransformerDistilled`.
        pre_head_dim: width of that layer.
        **kwargs: of `VisionTransformerDistilled`.
    """

    def __init__(self, *args: Any, pre_head_dim: int, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "final_norm": False})
        norm, linear = type(self.blocks[0].norm1)(self.embed_dim), nn.Linear(self.embed_dim, pre_head_dim)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        self.pre_head = nn.Sequential(norm, linear, nn.GELU())
        self.head_hidden_size = pre_head_dim
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for so many classes; see `VisionTransformer.reset_classifier`."""
        self.num_classes = num_classes
        width = self.head_hidden_size
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """As DeiT's, behind `pre_head`: both heads' logits while distilling, else their mean."""
        return super().forward_head(self.pre_head(x[:, :2]), pre_logits=pre_logits)


@register_model
def tinymim_fast_star(pretrained: bool = False, *, pre_head_dim: int = 1280, **kwargs: Any) -> WiderHeads:
    """A ViT-T with 12 heads, a distillation token and a layer of 1280 before the heads: TinyMIM*-T."""
    shape = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 12, **kwargs}
    return build_model_with_cfg(
        WiderHeads,
        "deit_tiny_distilled_patch16_224",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pre_head_dim=pre_head_dim,
        **shape,
    )
