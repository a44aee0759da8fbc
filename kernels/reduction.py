"""From row losses to the loss, and from the loss's upstream gradient back to the student's."""

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def reduce_rows(rows: Tensor, lengths: Tensor | None, reduction: str) -> Tensor:
    """(B, H, N) row losses, 0 beyond the length, to the loss."""
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / count_rows(*rows.shape, lengths)


def count_rows(num_images: int, num_heads: int, num_tokens: int, lengths: Tensor | None) -> int | Tensor:
    """Valid query rows over all images and heads, at least 1; on the device of `lengths`, without a sync."""
    if lengths is None:
        return num_images * num_heads * num_tokens
    return (lengths.long().clamp(0, num_tokens).sum() * num_heads).clamp(min=1)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, taken in the factor's dtype, in which 1 / (B H N) does not underflow as it does in fp16.

    One pass over memory: a product with `out` converts as it reads and writes. A factor without dimensions would be
    rounded to the gradient's dtype first.
    """
    factor = factor.reshape([1] * (gradient.ndim - factor.ndim) + list(factor.shape))
    return torch.mul(gradient, factor, out=torch.empty_like(gradient))


def refuse_second_derivative() -> None:
    """What a backward pass of a fused backend calls first: under create_graph its result would have no graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, want False: the fused backends have first derivatives only, "
            "backend='reference' has all"
        )
