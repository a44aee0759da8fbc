"""The loss and its gradient in one pass over chunks of heads: PyTorch on any device, three maps alive.

For one (image, head), with p = softmax(scale * X Y^T) over the rows and S the student's logits:

    row_i   = sum_j p_t[i, j] * (log p_t[i, j] - log p_s[i, j])
    dS      = w * (p_s - p_t)             w_i is the weight of row_i in the loss, 1 if none is given
    dX_s    = scale_s * dS   Y_s
    dY_s    = scale_s * dS^T X_s

The gradient needs nothing that the loss has not already computed, so it is formed while the maps are still in
cache. The difference p_s - p_t is taken in the working dtype, before any rounding: near convergence it is all
that is left.

On a CPU with a C++ compiler the same is done by compiled loops: cpu.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinymim_fast.kernels import cpu
from tinymim_fast.kernels.reference import MASKED_LOGIT, padding_mask, projections, working_dtype

# Bytes of one of the three maps of a chunk: large enough to pay for the calls, small enough for the caches.
# Times by chunk size are in benchmarks/NOTES.md; other devices need more work in a call to be full.
CPU_MAP_BYTES = 2**21
DEVICE_MAP_BYTES = 2**26


def relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    *,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None = None,
    row_weights: Tensor | None = None,
    d_x: Tensor | None = None,
    d_y: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor | None:
    """Row losses KL(teacher row || student row); the student's gradient is written into `d_x` and `d_y`.

    Args:
        x_s, y_s: student, (B, H, N, D_s), last dimension contiguous.
        x_t, y_t: teacher, (B, H, N, D_t), last dimension contiguous.
        scale_s, scale_t: factors on the logits.
        lengths: (B,) integers, the valid tokens of each image; None for all N.
        row_weights: (B, H, N), the upstream gradient of the rows; None for 1.
        d_x, d_y: (B, H, N, D_s) of any strides and dtype, overwritten; None where no gradient is wanted. One
            tensor given as both receives the sum, which is the gradient where x_s is y_s.
        gradient_scale: a factor on the gradient, taken in the working dtype.

    Returns:
        (B, H, N) row losses, 0 beyond the length; fp64 where an input is fp64, else fp32. None with `row_weights`:
        a backward pass has no use for them.

    Memory: where cpu.py takes the tensors, what it says; else three maps, each of at most CPU_MAP_BYTES or
        DEVICE_MAP_BYTES, or of N * N if that is more.
    Deterministic wherever torch.bmm is. fp32 products follow torch.get_float32_matmul_precision().
    """
    if cpu.takes(x_s, x_t):
        return cpu.relation_kl(
            x_s,
            y_s,
            x_t,
            y_t,
            scale_s=scale_s,
            scale_t=scale_t,
            lengths=lengths,
            row_weights=row_weights,
            d_x=d_x,
            d_y=d_y,
            gradient_scale=gradient_scale,
        )
    num_images, num_heads, num_tokens, _ = x_s.shape
    dtype = working_dtype(x_s, x_t)
    rows = x_s.new_empty(num_images, num_heads, num_tokens, dtype=dtype)
    padding = None if lengths is None else padding_mask(lengths, num_tokens)[:, None].expand(rows.shape)

    chunk_images, chunk_heads = chunk_shape(rows)
    scale_d = scale_s * gradient_scale
    maps = rows.new_empty(3, chunk_images * chunk_heads, num_tokens, num_tokens)

    with torch.autocast(x_s.device.type, enabled=False):
        for chunk in chunks(num_images, num_heads, chunk_images, chunk_heads):
            pad = None if padding is None else padding[chunk].flatten(0, 1)  # (heads, N)
            xs, ys, xt, yt = (operand(z[chunk], dtype, pad) for z in (x_s, y_s, x_t, y_t))  # (heads, N, D)
            logits, log_t, log_s = maps[:, : len(xs)]  # (heads, N, N)

            log_relation(xt, yt, scale_t, pad, logits, out=log_t)
            log_relation(xs, ys, scale_s, pad, logits, out=log_s)
            p_t = torch.exp(log_t, out=logits)
            if row_weights is None:
                kl = log_t.sub_(log_s).mul_(p_t)
                rows[chunk] = kl.sum(dim=-1).view_as(rows[chunk])

            if d_x is None and d_y is None:
                continue
            d_logits = log_s.exp_().sub_(p_t)
            if row_weights is not None:
                d_logits.mul_(row_weights[chunk].flatten(0, 1)[..., None])
            if pad is not None:
                d_logits.masked_fill_(pad[..., None], 0)
            if d_x is d_y:
                gradient = torch.bmm(d_logits, ys).baddbmm_(d_logits.mT, xs)
                d_x[chunk] = gradient.mul_(scale_d).view(d_x[chunk].shape)
                continue
            if d_x is not None:
                d_x[chunk] = torch.bmm(d_logits, ys).mul_(scale_d).view(d_x[chunk].shape)
            if d_y is not None:
                d_y[chunk] = torch.bmm(d_logits.mT, xs).mul_(scale_d).view(d_y[chunk].shape)

    if row_weights is not None:
        return None
    return rows if padding is None else rows.masked_fill_(padding, 0)


def packed_relation_kl(
    qkv_s: Tensor,
    qkv_t: Tensor,
    relation_heads: int,
    relations: Sequence[str],
    *,
    lengths: Tensor | None = None,
    d_qkv: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> list[Tensor]:
    """Row losses (B, H, N) of each relation; the student's gradient is written into `d_qkv`.

    Args:
        qkv_s, qkv_t: packed projections, (B, N, 3 C) each, relation_heads dividing C.
        relations: of "qk", "vv", "qq" and "kk", no two with a projection in common.
        lengths: as for relation_kl.
        d_qkv: place for the gradient, like `qkv_s`; None where none is wanted. What belongs to no relation is left.
        gradient_scale: as for relation_kl.
    """
    student, teacher = projections(qkv_s, relation_heads), projections(qkv_t, relation_heads)
    places = {} if d_qkv is None else projections(d_qkv, relation_heads)
    return [
        relation_kl(
            student[x],
            student[y],
            teacher[x],
            teacher[y],
            scale_s=student[x].shape[3] ** -0.5,
            scale_t=teacher[x].shape[3] ** -0.5,
            lengths=lengths,
            d_x=places.get(x),
            d_y=places.get(y),
            gradient_scale=gradient_scale,
        )
        for x, y in relations
    ]


def why_not(device: torch.device, dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> str | None:
    """None: it takes whatever PyTorch does."""
    return None


def log_relation(x: Tensor, y: Tensor, scale: float, pad: Tensor | None, logits: Tensor, out: Tensor) -> None:
    """out = log_softmax(scale * x y^T), with `logits` as scratch."""
    logits.baddbmm_(x, y.mT, beta=0, alpha=scale)
    if pad is not None:
        logits.masked_fill_(pad[..., None, :], MASKED_LOGIT)
    torch.log_softmax(logits, dim=-1, out=out)


def operand(z: Tensor, dtype: torch.dtype, pad: Tensor | None) -> Tensor:
    """(images, heads, N, D) as (images * heads, N, D) in the working dtype, with zeros beyond the length."""
    z = z.to(dtype).flatten(0, 1)
    return z if pad is None else z.masked_fill(pad[..., None], 0)


def chunk_shape(rows: Tensor) -> tuple[int, int]:
    """Images and heads of a chunk: some heads of one image, or all the heads of some images."""
    num_images, num_heads, num_tokens = rows.shape
    map_bytes = CPU_MAP_BYTES if rows.device.type == "cpu" else DEVICE_MAP_BYTES
    fitting = max(1, map_bytes // (num_tokens**2 * rows.element_size()))
    return min(num_images, max(1, fitting // num_heads)), min(num_heads, fitting)


def chunks(num_images: int, num_heads: int, chunk_images: int, chunk_heads: int) -> Iterator[tuple[slice, slice]]:
    """The index of each chunk in a (B, H, ...) tensor."""
    for b in range(0, num_images, chunk_images):
        for h in range(0, num_heads, chunk_heads):
            yield slice(b, b + chunk_images), slice(h, h + chunk_heads)
