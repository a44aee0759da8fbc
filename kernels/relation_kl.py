"""relation_kl: the op on (B, H, N, D) tensors, its registration and its autograd."""

import torch
from torch import Tensor

from tinymim_fast.kernels import backends, reference
from tinymim_fast.kernels.checks import check_lengths, check_no_tangent, check_tensors, outside_inference, resolve_scale
from tinymim_fast.kernels.reduction import (
    REDUCTIONS,
    count_rows,
    mean_is_folded,
    reduce_rows,
    refuse_second_derivative,
    upstream_applied,
)


def relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    lengths: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL divergence from a student's token relations to a teacher's.

        R = softmax(scale * x y^T)                                             (B, H, N, N), never kept
        loss[b, h, i] = sum_j R_t[b, h, i, j] * (log R_t[b, h, i, j] - log R_s[b, h, i, j])

    Student first, as in torch.nn.functional.kl_div. x and y are queries and keys for the relation QK, twice
    the values for VV. The gradient is computed together with the loss and kept for the backward pass in the
    student's dtype, except for reduction "none": there each row has its own upstream gradient, so the
    backward pass computes the maps again. Only first derivatives; backend "reference" has all of them.

    Args:
        x_s, y_s: student, (B, H, N, D_s), fp16, bf16, fp32 or fp64, both of one dtype, any strides with the
            last dimension contiguous. They may be one tensor.
        x_t, y_t: teacher, (B, H, N, D_t), on the same device, without gradient; their dtype may differ from
            the student's.
        scale_s, scale_t: factors on the logits, D ** -0.5 of the model that the tensor comes from if None.
        lengths: (B,) integers from 0 to N on the same device. Rows and columns beyond the length count
            nothing and get a gradient of 0. Values are checked on the CPU only, where it costs no
            synchronisation; elsewhere they act as if clamped.
        reduction: "mean" over B, H and the valid query rows (0 where there are none), "sum", or "none".
        backend: "triton" on CUDA and ROCm tensors of fp32, fp16 or bf16 with head widths up to 128; "chunked" or
            "reference" anywhere. "auto" is "triton" where that can run, else "chunked".

    Returns:
        A scalar, or (B, H, N) for "none" with 0 beyond the length; nats; fp64 where an input is fp64, else
        fp32. NaN or infinity in an input gives a loss that is not finite.

    Raises:
        ValueError: an argument's shape, dtype, device, strides or value is wrong, or backend "triton" cannot take it.

    Memory: "triton" keeps the student's gradient and five numbers per row, and copies x and y of a side whose
    strides differ; "chunked" keeps the student's gradient, and on a CPU with a C++ compiler one head's
    projections and 32 rows of maps a thread (cpu.py), elsewhere three maps of a chunk (6 MiB on a CPU, 192 MiB on
    other devices, or 3 N * N if that is more); "reference" keeps whole (B, H, N, N) maps.

    Source: TinyMIM, CVPR 2023, arXiv 2301.01296.
    """
    backends.check(backend)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {REDUCTIONS}")
    check_tensors(x_s=x_s, y_s=y_s, x_t=x_t, y_t=y_t)
    check_lengths(lengths, x_s, num_images=x_s.shape[0], num_tokens=x_s.shape[2])
    scale_s = resolve_scale("scale_s", scale_s, x_s)
    scale_t = resolve_scale("scale_t", scale_t, x_t)

    if backend == "reference":
        x_t, y_t = outside_inference(x_t), outside_inference(y_t)
        rows = reference.relation_kl(x_s, y_s, x_t, y_t, scale_s=scale_s, scale_t=scale_t, lengths=lengths)
        return reduce_rows(rows, lengths, reduction)
    check_no_tangent(x_s=x_s, y_s=y_s, x_t=x_t, y_t=y_t)
    want_grad = torch.is_grad_enabled() and reduction != "none"
    want_x, want_y = want_grad and x_s.requires_grad, want_grad and y_s.requires_grad
    backend = backends.resolve(backend, x_s.device, (x_s.dtype, x_t.dtype), (x_s.shape[3], x_t.shape[3]))
    if reduction == "none":  # the backward pass computes the maps again
        x_t, y_t = outside_inference(x_t), outside_inference(y_t)
    return _relation_kl(x_s, y_s, x_t, y_t, lengths, scale_s, scale_t, reduction, backend, want_x, want_y, True)[0]


@torch.library.custom_op("tinymim_fast::relation_kl", mutates_args=())
def _relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    lengths: Tensor | None,
    scale_s: float,
    scale_t: float,
    reduction: str,
    backend: str,
    want_x: bool,
    want_y: bool,
    consume: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradient (empty where not wanted); of a mean that of the sum, see `mean_is_folded`.

    With `consume`, the caller drops the gradients, and the backward pass may write into them.
    """
    d_x, d_y = _empty_gradients(x_s, y_s, want_x, want_y)
    folded = consume and reduction == "mean" and mean_is_folded(x_s.dtype, lengths)
    rows = backends.FUSED[backend].relation_kl(
        x_s,
        y_s,
        x_t,
        y_t,
        scale_s=scale_s,
        scale_t=scale_t,
        lengths=lengths,
        d_x=d_x if want_x else None,
        d_y=d_y if want_y else None,
        gradient_scale=1 / x_s.shape[:3].numel() if folded else 1.0,
    )
    return reduce_rows(rows, lengths, reduction), d_x, d_y


@_relation_kl.register_fake
def _(x_s, y_s, x_t, y_t, lengths, scale_s, scale_t, reduction, backend, want_x, want_y, consume=False):
    shape = x_s.shape[:3] if reduction == "none" else ()
    loss = x_s.new_empty(shape, dtype=reference.working_dtype(x_s, x_t))
    return loss, *_empty_gradients(x_s, y_s, want_x, want_y)


@torch.library.custom_op("tinymim_fast::relation_kl_backward", mutates_args=())
def _relation_kl_backward(
    d_rows: Tensor,
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    lengths: Tensor | None,
    scale_s: float,
    scale_t: float,
    backend: str,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient for reduction "none", from the upstream gradient of the rows."""
    d_x, d_y = _empty_gradients(x_s, y_s, want_x, want_y)
    backends.FUSED[backend].relation_kl(
        x_s,
        y_s,
        x_t,
        y_t,
        scale_s=scale_s,
        scale_t=scale_t,
        lengths=lengths,
        row_weights=d_rows,
        d_x=d_x if want_x else None,
        d_y=d_y if want_y else None,
    )
    return d_x, d_y


@_relation_kl_backward.register_fake
def _(d_rows, x_s, y_s, x_t, y_t, lengths, scale_s, scale_t, backend, want_x, want_y):
    return _empty_gradients(x_s, y_s, want_x, want_y)


def _setup_context(ctx, inputs, output):
    x_s, y_s, x_t, y_t, lengths, ctx.scale_s, ctx.scale_t, ctx.reduction, ctx.backend, _, _, consume = inputs
    _, d_x, d_y = output
    ctx.consumer = ctx.backend if consume else None
    ctx.mark_non_differentiable(d_x, d_y)
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.save_for_backward(x_s, y_s, x_t, y_t, lengths)
    else:
        ctx.num_images, ctx.num_heads, ctx.num_tokens, _ = x_s.shape
        ctx.save_for_backward(d_x, d_y, lengths)


def _backward(ctx, d_loss, *_):
    refuse_second_derivative()
    if d_loss is None:
        return (None,) * 12
    want_x, want_y = ctx.needs_input_grad[:2]
    if ctx.reduction == "none":
        d_x, d_y = _relation_kl_backward(
            d_loss, *ctx.saved_tensors, ctx.scale_s, ctx.scale_t, ctx.backend, want_x, want_y
        )
    else:
        d_x, d_y, lengths = ctx.saved_tensors
        folded = ctx.reduction == "sum" or (ctx.consumer and mean_is_folded(d_x.dtype, lengths))
        count = 1 if folded else count_rows(ctx.num_images, ctx.num_heads, ctx.num_tokens, lengths)
        d_x, d_y = (
            upstream_applied(z, d_loss, (0,), count, ctx.consumer, z.numel()) if wanted else None
            for z, wanted in ((d_x, want_x), (d_y, want_y))
        )
    return d_x if want_x else None, d_y if want_y else None, *[None] * 10


_relation_kl.register_autograd(_backward, setup_context=_setup_context)


def _empty_gradients(x_s: Tensor, y_s: Tensor, want_x: bool, want_y: bool) -> tuple[Tensor, Tensor]:
    """Both with the strides of x_s; empty where not wanted."""
    d_x = torch.empty_like(x_s) if want_x else x_s.new_empty(0)
    d_y = torch.empty_like(x_s) if want_y else y_s.new_empty(0)
    return d_x, d_y
