"""Tensors from any number of places of one vision transformer, computed no further than the last of them.

Where a place lies, in block n of a pre-norm transformer (x is the residual stream, LayerScale in `ls`):

    x                                      input
    norm1(x)                               norm1
    qkv(norm1(x))                          qkv
    a = ls1(attn(norm1(x)))                attention, before the residual
    x + drop_path1(a)                      attention, after it
    m = ls2(mlp(norm2(x)))                 mlp, before the residual
    x + drop_path2(m)                      mlp, after it; also output

and behind the last block: norm(x) is final_norm, its first token class_token; what the classifier makes of it, logits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models.attention import attend_and_project
from tinymim_fast.models.masking import gather_tokens

# What of a block a place needs, in the order in which it is computed.
STAGES = ("input", "norm1", "qkv", "attention", "attention after", "mlp", "output")
IN_BLOCK = ("input", "norm1", "qkv", "attention", "mlp", "output")
BEHIND = ("final_norm", "class_token", "logits")
BLOCK_PARTS = {
    "input": (),
    "norm1": ("norm1",),
    "qkv": ("norm1", "attn"),
    "attention": ("norm1", "attn", "ls1"),
    "attention after": ("norm1", "attn", "ls1", "drop_path1"),
    "mlp": ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2"),
}
HEAD_PARTS = ("fc_norm", "attn_pool", "head_drop", "head")


class Place(NamedTuple):
    """One tensor of a vision transformer.

    Args:
        at: "input", "norm1", "qkv", "attention", "mlp" or "output" of a block, each (B, N, C), the packed [q | k | v]
            after a qk-norm (B, N, 3 C); "final_norm", (B, N, C), or behind it "class_token", (B, C), or "logits",
            (B, classes).
        block: 1-based; None for those that lie behind the blocks.
        after_residual: of "attention" and "mlp": the residual stream after the addition, not what is added. What is
            added comes with LayerScale and without drop path, which would make it zero for some images.
    """

    at: str
    block: int | None = None
    after_residual: bool = False

    def __str__(self) -> str:
        where = f"{self.at} of block {self.block}" if self.block else self.at
        return f"{where} after the residual" if self.after_residual else where

    @property
    def stage(self) -> int:
        """How far a block is computed for this place, a number in `STAGES`; of the last block for those behind it."""
        if self.at in BEHIND or (self.at == "mlp" and self.after_residual):
            return STAGES.index("output")
        return STAGES.index("attention after" if self.after_residual else self.at)


class Taps(nn.Module):
    """A vision transformer that gives the tensors at `places`, and computes and holds nothing behind the last of them.

    `model` stays whole. Weights are shared with it, not copied: `to`, `requires_grad_` and training reach the model's
    too. What the places need keeps timm's names behind "model."; the rest is not among this module's parameters.

    Args:
        model: timm VisionTransformer, see `check_supported` in vit.py.
        places: one or more, in any order.

    Raises:
        InputError: a place that this model doesn't have; argument "block" where the model has fewer blocks.
    """

    def __init__(self, model: VisionTransformer, places: Sequence[Place]):
        super().__init__()
        depth = len(model.blocks)
        for place in places:
            _check(place, model, depth)
        self.places = tuple(places)
        self._blocks = {place: place.block or depth for place in self.places}  # the block that a place is computed in
        self._last = max(self._blocks.values())
        self._last_stage = max(p.stage for p in self.places if self._blocks[p] == self._last)
        self._normed = any(p.at in BEHIND for p in self.places)
        self.num_prefix_tokens = model.num_prefix_tokens
        self.num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        self.widths = {place: _width(place, model) for place in self.places}
        self.model = self._needed(model)

    def _needed(self, model: VisionTransformer) -> VisionTransformer:
        """The same weights without what lies behind the last place."""
        last, stage = self._last, STAGES[self._last_stage]
        block = model.blocks[last - 1]
        if stage in BLOCK_PARTS:
            parts = dict(block.named_children())
            block = _shallow(block, {name: parts[name] for name in BLOCK_PARTS[stage]})
        if stage == "qkv":
            attn = block.attn
            block.attn = _shallow(attn, {name: getattr(attn, name) for name in ("qkv", "q_norm", "k_norm")})
        kept = [*model.blocks[: last - 1], *([] if stage == "input" else [block])]
        logits = any(place.at == "logits" for place in self.places)
        parts = {name: part for name, part in model.named_children() if logits or name not in HEAD_PARTS}
        if not self._normed:
            del parts["norm"]
        return _shallow(model, {**parts, "blocks": nn.Sequential(*kept)})

    def __call__(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> dict[Place, torch.Tensor]:
        """`forward`; of hooks only its parts' run: ZeRO-3's, on every module, want strings as keys of a dict."""
        return self.forward(images) if visible is None else self.forward(images, visible)

    def forward(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> dict[Place, torch.Tensor]:
        """The tensors by place, in the order of `places`.

        Args:
            images: (B, 3, H, W) in the model's dtype.
            visible: numbers of the patches that the blocks see, (B, V) int64, in the order of the tokens that come
                out behind the prefix; None: all.
        """
        model = self.model
        found: dict[Place, torch.Tensor] = {}
        x = model._pos_embed(model.patch_embed(images))
        if visible is not None:
            x = gather_tokens(x, visible, self.num_prefix_tokens)
        x = model.norm_pre(model.patch_drop(x))
        for number in range(1, self._last + 1):
            wanted = [place for place in self.places if place.block == number]
            if number == self._last:
                stage = self._last_stage
            else:
                stage = STAGES.index("output")
            if stage == 0:
                found |= dict.fromkeys(wanted, x)
            elif not wanted and stage == STAGES.index("output"):
                x = model.blocks[number - 1](x)
            else:
                x = _run_block(model.blocks[number - 1], x, stage, wanted, found)
        if self._normed:
            x = model.norm(x)
            behind = {"final_norm": lambda: x, "class_token": lambda: x[:, 0], "logits": lambda: model.forward_head(x)}
            found |= {place: behind[place.at]() for place in self.places if place.at in BEHIND}
        return {place: found[place] for place in self.places}


def _run_block(
    block: Block, x: torch.Tensor, stage: int, wanted: Sequence[Place], found: dict[Place, torch.Tensor]
) -> torch.Tensor:
    """timm's `Block.forward` up to `stage`, what is `wanted` on the way put into `found`; gives the residual stream."""

    def note(name: str, tensor: torch.Tensor) -> bool:
        """Whether the block ends here."""
        number = STAGES.index(name)
        found.update({place: tensor for place in wanted if place.stage == number})
        return stage == number

    if note("input", x):
        return x
    h = block.norm1(x)
    if note("norm1", h):
        return x
    attn = block.attn
    if stage == STAGES.index("qkv") or any(place.at == "qkv" for place in wanted):
        qkv = attn.qkv(h)
        q, k, v = _normed_heads(attn, qkv)
        has_norm = not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
        if note("qkv", torch.stack((q, k, v), dim=2).flatten(2) if has_norm else qkv):
            return x
        a = attend_and_project(attn, h, q, k, v)
    else:
        a = attn(h)
    a = block.ls1(a)
    if note("attention", a):
        return x
    x = x + block.drop_path1(a)
    if note("attention after", x):
        return x
    m = block.ls2(block.mlp(block.norm2(x)))
    if note("mlp", m):
        return x
    x = x + block.drop_path2(m)
    note("output", x)
    return x


def _normed_heads(attn: Attention, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v after qk-norm, (B, N, H, D) each, from the packed projection."""
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    return attn.q_norm(q), attn.k_norm(k), v


def _shallow(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A module of the same class and parameters with these children; what they hold is shared."""
    twin = copy.copy(module)
    twin._modules = dict(children)
    return twin


def _check(place: Place, model: VisionTransformer, depth: int) -> None:
    if place.at not in IN_BLOCK + BEHIND:
        raise InputError(f"got a place {place.at!r}, want one of {', '.join(IN_BLOCK + BEHIND)}", argument="places")
    if place.after_residual and place.at not in ("attention", "mlp"):
        raise InputError(f"got {place}, want attention or mlp with after_residual", argument="places")
    if place.at in IN_BLOCK and not (isinstance(place.block, int) and 1 <= place.block <= depth):
        raise InputError(f"got {place.block}, want 1 to {depth}, the number of the model's blocks", argument="block")
    if place.at in BEHIND:
        if place.block is not None:
            raise InputError(f"got {place}, want no block with {place.at}", argument="places")
        if place.at == "logits":
            if isinstance(model.head, nn.Identity):
                raise InputError("got logits, but this model has no classifier", argument="places")
        elif isinstance(model.norm, nn.Identity):
            raise InputError(f"got {place}, but this model has no norm behind its last block", argument="places")
        if place.at == "class_token" and not model.has_class_token:
            raise InputError("got class_token, but this model has none", argument="places")


def _width(place: Place, model: VisionTransformer) -> int:
    if place.at == "logits":
        return model.num_classes
    return model.blocks[place.block - 1].attn.qkv.out_features if place.at == "qkv" else model.embed_dim
