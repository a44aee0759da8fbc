"""Random masking of patches, as in masked autoencoders (MAE, arXiv 2111.06377)."""

from __future__ import annotations

import torch

from tinymim_fast.errors import InputError


def num_visible(mask_ratio: float, num_patches: int) -> int:
    """How many patches stay visible.

    Raises:
        InputError: none; argument "mask_ratio".
    """
    visible = int(num_patches * (1 - mask_ratio))
    if visible < 1:
        raise InputError(f"got {mask_ratio}, which leaves none of {num_patches} patches visible", argument="mask_ratio")
    return visible


def shuffled_patches(num_images: int, num_patches: int, device: torch.device) -> torch.Tensor:
    """A random order of each image's patches, (B, L) int64; those at its beginning stay visible."""
    return torch.rand(num_images, num_patches, device=device).argsort(dim=1)


def gather_tokens(tokens: torch.Tensor, visible: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """The prefix and the visible patches, (B, P + V, C).

    Args:
        tokens: (B, P + L, C).
        visible: numbers of patches, (B, V) int64.
        num_prefix_tokens: P, class and register tokens.
    """
    patches = tokens[:, num_prefix_tokens:]
    patches = patches.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat((tokens[:, :num_prefix_tokens], patches), dim=1) if num_prefix_tokens else patches
