"""Relations without softmax, from D x D Gram matrices: no N x N map, cost O(N D^2)."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def relation_mse(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor) -> Tensor:
    """Mean squared difference of the scaled products of student and teacher.

        loss = mean over b, h, i, j of (s x_s[i] . y_s[j] - t x_t[i] . y_t[j])^2,  s = D_s^-1/2, t = D_t^-1/2
             = mean over b, h of (s^2 <X_s^T X_s, Y_s^T Y_s> - 2 s t <X_s^T X_t, Y_s^T Y_t>
                                  + t^2 <X_t^T X_t, Y_t^T Y_t>) / N^2

    Precision: near convergence the three terms cancel, and what is left is known to the rounding of the largest: with
    r = |S - T| / |T|, the relative error of the loss is about eps / r^2. So Gram matrices and their products are fp64
    for fp32 inputs (eps / r^2 is 1 % at r = 1e-7, the rounding of fp32 itself), and fp32 for 16-bit inputs (1 % at
    r = 3e-3, that of bf16). A loss that rounding makes negative is given as 0, its gradient as it is.

    Args:
        x_s, y_s: student, (B, H, N, D_s), any floating dtype.
        x_t, y_t: teacher, (B, H, N, D_t), without gradient.

    Returns:
        A scalar, fp64 where an input is, else fp32; differentiable any number of times.

    Memory: copies of the four in fp64 (fp32 for 16-bit inputs) and six D x D matrices a head.
    """
    half = all(z.dtype in HALF for z in (x_s, y_s, x_t, y_t))
    result = torch.float64 if torch.float64 in (x_s.dtype, x_t.dtype) else torch.float32
    scale_s, scale_t = x_s.shape[-1] ** -0.5, x_t.shape[-1] ** -0.5
    with torch.autocast(x_s.device.type, enabled=False):
        wide = {id(z): z.to(torch.float32 if half else torch.float64) for z in (x_s, y_s, x_t, y_t)}
        x_s, y_s, x_t, y_t = (wide[id(z)] for z in (x_s, y_s, x_t, y_t))
        squares = (
            scale_s**2 * _product(x_s, x_s, y_s, y_s)
            - 2 * scale_s * scale_t * _product(x_s, x_t, y_s, y_t)
            + scale_t**2 * _product(x_t, x_t, y_t, y_t)
        )
    loss = squares.mean() / x_s.shape[-2] ** 2
    loss = loss + (loss.clamp_min(0) - loss).detach()
    return loss.to(result)


def _product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """<A^T B, C^T D>, (B, H), from (B, H, N, D_a) and so on."""
    first = a.mT @ b
    second = first if c is a and d is b else c.mT @ d
    return (first * second).sum((-2, -1))
