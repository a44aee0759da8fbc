"""The formula, materialised: plain differentiable PyTorch, the oracle for tests and benchmarks.

For one (image, head), with rows i (queries) and columns j (keys):

    R = softmax(scale * X Y^T)                      for the student (R_s) and for the teacher (R_t)
    row_i = sum_j R_t[i, j] * (log R_t[i, j] - log R_s[i, j])

Source: TinyMIM, CVPR 2023, arXiv 2301.01296, section 3. Logarithms are taken by log-sum-exp, never of a
softmax.
"""

import torch
from torch import Tensor

# The logit of a key beyond the length. Finite, because (-inf) - (-inf) is NaN; its exponential is exactly 0.
MASKED_LOGIT = -1e30
# Roundings of a result that no computation in the dtype can avoid, relative to the largest exact entry: the floor of
# the rule error(ours) <= 2 * error(PyTorch in the same dtype) + floor, which tests and benchmarks share. Half-precision
# gradients are rounded twice, when stored and when multiplied by the upstream gradient.
FLOORS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    *,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Row losses KL(teacher row || student row), with every N x N map in memory.

    Args:
        x_s, y_s: student, (B, H, N, D_s), any floating dtype and device.
        x_t, y_t: teacher, (B, H, N, D_t).
        scale_s, scale_t: factors on the logits.
        lengths: (B,) integers, the valid tokens of each image; None for all N.

    Returns:
        (B, H, N) row losses, 0 beyond the length; fp64 where an input is fp64, else fp32. Differentiable any
        number of times.

    Memory: about ten maps of B * H * N * N elements, with those that autograd keeps.
    """
    dtype = working_dtype(x_s, x_t)
    padding = None if lengths is None else padding_mask(lengths, x_s.shape[2])[:, None]  # (B, 1, N)

    def log_relation(x: Tensor, y: Tensor, scale: float) -> Tensor:
        x, y = x.to(dtype), y.to(dtype)
        if padding is None:
            return torch.log_softmax(scale * (x @ y.mT), dim=-1)
        x, y = x.masked_fill(padding[..., None], 0), y.masked_fill(padding[..., None], 0)
        logits = (scale * (x @ y.mT)).masked_fill(padding[..., None, :], MASKED_LOGIT)
        return torch.log_softmax(logits, dim=-1)

    with torch.autocast(x_s.device.type, enabled=False):
        log_s = log_relation(x_s, y_s, scale_s)
        log_t = log_relation(x_t, y_t, scale_t)
        rows = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    return rows if padding is None else rows.masked_fill(padding, 0)


def working_dtype(x_s: Tensor, x_t: Tensor) -> torch.dtype:
    """The dtype of logits, sums and losses: fp64 where an input is fp64, else fp32."""
    return torch.float64 if torch.float64 in (x_s.dtype, x_t.dtype) else torch.float32


def padding_mask(lengths: Tensor, num_tokens: int) -> Tensor:
    """(B, N) booleans, True beyond the length."""
    return torch.arange(num_tokens, device=lengths.device) >= lengths[:, None]


def projections(qkv: Tensor, relation_heads: int) -> dict[str, Tensor]:
    """Views {"q", "k", "v"} of (B, N, 3 C), each (B, H, N, D)."""
    by_head = qkv.unflatten(2, (3, relation_heads, -1)).permute(2, 0, 3, 1, 4)
    return dict(zip("qkv", by_head.unbind(), strict=True))
