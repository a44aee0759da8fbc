"""timm's VisionTransformer as students and teachers: built, checked, initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath
from timm.models import register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import check_kwargs, check_name


def create_vit(name: str, *, img_size: int, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`timm.create_model`, without a classifier by default, refusing what taps do not fit.

    Args:
        name: plain timm model name.
        img_size: side of the square input, pixels.
        pretrained: load timm's own weights, over the network where they are not cached.
        **kwargs: for the model, any of `architecture.KWARGS`, e.g. `reg_tokens`, `class_token`; `num_heads` may be
            a list, one number for each block.

    Raises:
        InputError: unknown name (argument "model"), arguments that can't be (argument "model_kwargs"), or not a plain
            VisionTransformer (argument "model").
    """
    check_name(name)
    kwargs = {"num_classes": 0, **check_kwargs(kwargs)}
    if not kwargs.get("class_token", True):
        kwargs.setdefault("global_pool", "avg")
    heads = kwargs.get("num_heads")
    if isinstance(heads, (list, tuple)):
        kwargs["num_heads"] = heads[0]
    try:
        model = timm.create_model(name, img_size=img_size, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError, AssertionError, ValueError, KeyError, ArithmeticError, MemoryError) as error:
        given = f" with {kwargs}" if len(kwargs) > 1 else ""
        raise InputError(f"{name}: timm can't build it{given}: {error}", argument="model") from error
    check_supported(model, name)
    if isinstance(heads, (list, tuple)):
        set_num_heads(model, heads)
    return model


def set_num_heads(model: VisionTransformer, num_heads: Sequence[int]) -> None:
    """Give each block its number of heads, in place; no weight changes: a head is a group of channels.

    Args:
        model: see `check_supported`.
        num_heads: one number for each block.

    Raises:
        InputError: not one for each block, a number that does not divide the width, or a qk-norm, whose weights are as
            wide as a head; argument "model_kwargs".
    """
    if len(num_heads) != len(model.blocks):
        raise InputError(
            f"got num_heads for {len(num_heads)} blocks, but the model has {len(model.blocks)}", argument="model_kwargs"
        )
    for number, (block, heads) in enumerate(zip(model.blocks, num_heads, strict=True), 1):
        attn = block.attn
        if heads == attn.num_heads:
            continue
        if attn.attn_dim % heads:
            raise InputError(
                f"got {heads} heads for block {number}, want a number that divides its width {attn.attn_dim}",
                argument="model_kwargs",
            )
        if not isinstance(attn.q_norm, nn.Identity):
            raise InputError(
                "got other numbers of heads in other blocks with qk_norm, whose weights are as wide as one; want one",
                argument="model_kwargs",
            )
        attn.num_heads, attn.head_dim = heads, attn.attn_dim // heads
        attn.scale = attn.head_dim**-0.5


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
                f"block {i} is a {type(block).__name__} with {attn.__name__}, want timm's Block with Attention "
                "(pre-norm, one qkv projection)",
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
    if not isinstance(patches, nn.Identity):  # of a hybrid whose convolutions end in the blocks' width
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


class _Fp32BatchNorm:
    """Mixed into a BatchNorm whose weights an engine casts to 16 bits: it computes in the type of its statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None or self.weight.dtype == self.running_mean.dtype:
            return super().forward(x)
        kept = self._parameters  # not torch.func.functional_call, which would call a user's hooks a second time
        self._parameters = {name: parameter.float() for name, parameter in kept.items()}
        try:
            return super().forward(x.float()).to(x.dtype)
        finally:
            self._parameters = kept


def keep_batch_norm_fp32(model: nn.Module) -> None:
    """Make BatchNorms (of timm's hybrids) take 16-bit weights and images beside fp32 statistics, in place.

    PyTorch's batch norm refuses such a mixture on the CPU, and statistics in bf16 would stop moving 2 % from the mean.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            kind = type(module)
            module.__class__ = type(f"Fp32{kind.__name__}", (_Fp32BatchNorm, kind), {})


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
    """Width, and the number of heads of each block: what no weight shows, and a loader must not change silently."""
    return {"embed_dim": model.embed_dim, "num_heads": [block.attn.num_heads for block in model.blocks]}


def check_heads(model: VisionTransformer, num_heads: Sequence[int], source: object) -> None:
    """Refuse a model whose blocks have other numbers of heads than the weights that it gets were trained with.

    Args:
        model: as built.
        num_heads: of the checkpoint, one number for each block.
        source: the checkpoint, for the message.

    Raises:
        InputError: names the first block that differs and both numbers; argument "model_kwargs".
    """
    built = head_layout(model)["num_heads"]
    for number, (ours, theirs) in enumerate(zip(built, num_heads), 1):
        if ours != theirs:
            raise InputError(
                f"block {number} has {ours} heads in the model and {theirs} in {source}; weights mean something else "
                f"under another number: leave num_heads out, or give {list(num_heads)}",
                argument="model_kwargs",
            )


@register_model
def tinymim_fast_vit(
    pretrained: bool = False, *, base: str, num_heads: Sequence[int], **kwargs: Any
) -> VisionTransformer:
    """timm's model `base` with a number of heads for each block, which no plain timm model can have.

    What `tinymim_fast.export` names in such a model's config.json: `timm.create_model("local-dir:DIR",
    pretrained=True)` gives it after `import tinymim_fast.models`, and without that import fails, rather than give
    other attention.
    """
    model = timm.model_entrypoint(check_name(base))(pretrained=pretrained, num_heads=num_heads[0], **kwargs)
    set_num_heads(model, num_heads)
    return model
