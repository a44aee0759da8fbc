"""timm's VisionTransformer as students and teachers: built, checked, initialised."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tinymim_fast.errors import InputError


def create_vit(name: str, *, img_size: int, **kwargs: Any) -> VisionTransformer:
    """`timm.create_model` without a classifier, refusing what taps do not fit.

    Args:
        name: timm model name, or `local-dir:DIR`.
        img_size: side of the square input, pixels.
        **kwargs: for the model, e.g. `reg_tokens`, `class_token`, `patch_size`, `pretrained`.

    Raises:
        InputError: unknown name, arguments that timm refuses, or not a plain VisionTransformer; argument "model".
    """
    if not kwargs.get("class_token", True):
        kwargs.setdefault("global_pool", "avg")
    try:
        model = timm.create_model(name, num_classes=0, img_size=img_size, **kwargs)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        given = f" with {kwargs}" if kwargs else ""
        raise InputError(f"{name}: timm can't build it{given}: {error}", argument="model") from error
    check_supported(model, name)
    return model


def check_supported(model: nn.Module, name: str) -> None:
    """Refuse models that taps can't read.

    Supported: pre-norm blocks with one fused qkv projection; class token or none, register tokens, any patch and image
    size, learned or fixed absolute position embeddings, LayerScale, qk-norm.

    Args:
        model: any module.
        name: what the error calls it.

    Raises:
        InputError: not a plain VisionTransformer of timm's; argument "model".
    """
    if not isinstance(model, VisionTransformer):
        raise _unsupported(name, f"is a {type(model).__name__}, want one of timm's VisionTransformer models")
    if type(model).forward_features is not VisionTransformer.forward_features:
        raise _unsupported(name, f"{type(model).__name__} has a forward of its own, want a plain VisionTransformer")
    for i, block in enumerate(model.blocks, start=1):
        attn = type(getattr(block, "attn", None))
        if type(block) is not Block or attn is not Attention:
            raise _unsupported(
                name,
                f"block {i} is a {type(block).__name__} with {attn.__name__}, want timm's Block with Attention (pre-norm, "
                "one qkv projection)",
            )


def _unsupported(name: str, why: str) -> InputError:
    return InputError(f"{name}: {why}", argument="model")


def default_target_block(depth: int) -> int:
    """18 of 24 blocks (ViT-L, table 7 of the paper), else the last; 1-based."""
    return 18 if depth == 24 else depth


def freeze(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """In place: evaluation mode, no gradients, on `device` in `dtype`."""
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def init_mae_style(model: nn.Module, *, pos_embed: str) -> None:
    """Weights as MAE and TinyMIM start them, in place.

    Xavier-uniform linear layers with zero bias, the patch embedding like a linear layer, class and register tokens from
    N(0, 0.02), LayerNorms at identity. `pos_embed` "sincos" sets the position embedding to `sincos_2d` and freezes it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    patches = model.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if model.pos_embed is None:
        return
    if pos_embed == "sincos":
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed.data.copy_(sincos_2d(model.patch_embed.grid_size, model.embed_dim, prefix))
        model.pos_embed.requires_grad_(False)
    else:
        nn.init.normal_(model.pos_embed, std=0.02)


def set_constant_drop_path(model: VisionTransformer, rate: float) -> None:
    """The same drop path rate in every block but the last, as TinyMIM has it (timm's own grows with depth)."""
    for block in model.blocks[:-1]:
        block.drop_path1 = DropPath(rate) if rate else nn.Identity()
        block.drop_path2 = DropPath(rate) if rate else nn.Identity()


def sincos_2d(grid: tuple[int, int], dim: int, num_prefix_tokens: int) -> torch.Tensor:
    """Fixed position embedding (1, prefix + rows * columns, dim), fp32; zero for prefix tokens.

    `[sin(x w), cos(x w), sin(y w), cos(y w)]` with `w_k = 10000 ** (-4 k / dim)`, the layout of MAE's checkpoints.

    Raises:
        InputError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise InputError(
            f"sin-cos position embeddings: got width {dim}, want a multiple of 4, or learned ones", argument="pos_embed"
        )
    rows, columns = grid
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    embed = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
    return torch.cat([embed.new_zeros(num_prefix_tokens, dim), embed])[None]


def whole_blocks(model: nn.Module) -> tuple[Block, ...]:
    """timm's blocks in `model` that have all their parts; a tap's last one may have less."""
    return tuple(m for m in model.modules() if isinstance(m, Block) and hasattr(m, "drop_path2"))


def head_layout(model: VisionTransformer) -> dict[str, Any]:
    """What of the attention's layout a later loader must not change silently."""
    return {"embed_dim": model.embed_dim, "num_heads": [b.attn.num_heads for b in model.blocks]}
