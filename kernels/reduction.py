"""From row losses to the loss, and from the loss's upstream gradient back to the student's."""

import torch
from torch import Tensor

from tinymim_fast.kernels import triton_backend

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


def mean_rows(rows: Tensor | list[Tensor], lengths: Tensor | None) -> Tensor:
    """The mean row loss of each relation, (R,).

    Args:
        rows: (B, H, N) of each relation, 0 beyond the length; one tensor of them has one sum for all.
    """
    if isinstance(rows, Tensor):
        return rows.sum((1, 2, 3)) / count_rows(*rows.shape[1:], lengths)
    return torch.stack([reduce_rows(of_one, lengths, "mean") for of_one in rows])


def mean_is_folded(dtype: torch.dtype, lengths: Tensor | None) -> bool:
    """Whether the forward pass writes the gradient of the mean, so that the backward pass has nothing to multiply.

    Elsewhere it writes that of the sum: 1 / (B H N) underflows in fp16, and with `lengths` only the device knows it.
    """
    return dtype != torch.float16 and lengths is None


def upstream_applied(
    gradient: Tensor,
    upstream: Tensor,
    relations: tuple[int, ...],
    count: int | Tensor,
    consumer: str | None,
    width: int,
) -> Tensor:
    """gradient * upstream / count, of what the forward pass kept.

    In place with a `consumer`, where the graph is not kept for another backward pass: a factor of 1 then costs no pass
    over memory. Otherwise, and where a compiler traces, into a tensor of its own; so does "chunked" off the CPU, where
    only Triton can look at the factor without a wait.

    Args:
        gradient: dense, of rows of `width` elements; row i is of part i % len(relations).
        upstream: (R,) or (); its product is taken in its dtype.
        relations: of each part, which of `upstream` is its factor.
        count: what to divide by, a number or a tensor of one.
        consumer: the backend whose gradient this is, and nobody else's; None where it may not be written into.
        width: of a row.
    """
    # torch.compile and other tracers have tensors of classes of their own.
    if consumer and type(gradient) is Tensor and not _graph_is_kept():
        if consumer == "triton":
            triton_backend.rescale(gradient, upstream, relations, count, width)
            return gradient
        if gradient.device.type == "cpu":
            _rescale_on_cpu(gradient, (upstream / count).reshape(-1).tolist(), relations)
            return gradient
    upstream = upstream / count
    if len(relations) == 1:
        return scaled(gradient, upstream)
    factors = upstream.unbind()
    of_parts = torch.stack([factors[relation] for relation in relations])
    parts = gradient.unflatten(-1, (len(relations), -1))
    return scaled(parts, of_parts[:, None]).flatten(-2)


def _rescale_on_cpu(gradient: Tensor, factors: list[float], relations: tuple[int, ...]) -> None:
    """gradient *= its part's factor; the host knows which are 1, and passes over them."""
    if len({factors[relation] for relation in relations}) == 1:
        if factors[relations[0]] != 1:
            gradient.mul_(factors[relations[0]])
        return
    for part, relation in zip(gradient.unflatten(-1, (len(relations), -1)).unbind(-2), relations, strict=True):
        if factors[relation] != 1:
            part.mul_(factors[relation])


def _graph_is_kept() -> bool:
    """Whether this backward pass has retain_graph; True where this PyTorch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return ask()


def refuse_second_derivative() -> None:
    """What a backward pass of a fused backend calls first: under create_graph its result would have no graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, want False: the fused backends have first derivatives only, "
            "backend='reference' has all"
        )
