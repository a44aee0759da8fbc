"""Inputs of the relation losses, and what a user would write in PyTorch."""

import torch
from torch import nn

from tinymim_fast.kernels import relation_kl, relation_loss


def inputs(shape, dtype=torch.float32, seed=0):
    """x_s, y_s, x_t, y_t; the teacher sharper than the student, so that the loss is of order one."""
    b, h, n, d_s, d_t = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        (std * torch.randn(b, h, n, d, generator=generator)).to(dtype)
        for d, std in ((d_s, 1.0), (d_s, 1.0), (d_t, 1.3), (d_t, 1.3))
    ]


def loss_and_grads(function, x_s, y_s, x_t, y_t, upstream=1.0, **kwargs):
    x_s, y_s = x_s.detach().requires_grad_(), y_s.detach().requires_grad_()
    loss = function(x_s, y_s, x_t, y_t, **kwargs)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape))
    return loss.detach(), x_s.grad, y_s.grad


def log_relations(x_s, y_s, x_t, y_t):
    return [torch.log_softmax((x @ y.mT) * x.shape[-1] ** -0.5, dim=-1) for x, y in ((x_s, y_s), (x_t, y_t))]


def pytorch_kl(x_s, y_s, x_t, y_t, reduction="mean"):
    """What a user would write, in the dtype of the inputs throughout."""
    log_s, log_t = log_relations(x_s, y_s, x_t, y_t)
    rows = nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()


def assert_relation_kl_as_exact(assert_as_exact, tensors, dtype, backend, upstream=1.0, reduction="mean"):
    kwargs = {"upstream": upstream, "reduction": reduction}
    ours = loss_and_grads(relation_kl, *tensors, backend=backend, **kwargs)
    theirs = loss_and_grads(pytorch_kl, *tensors, **kwargs)
    exact = loss_and_grads(relation_kl, *(z.double() for z in tensors), backend="reference", **kwargs)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == ours[2].dtype == dtype
    for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, theirs, exact):
        assert_as_exact(name, *results, dtype if name != "loss" else ours[0].dtype)


def packed(shape, dtype=torch.float32, seed=0):
    b, n, heads, d_s, d_t = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, 3 * heads * d, generator=generator).to(dtype) for d in (d_s, d_t)]


def heads_of(qkv, heads):
    """Independent of the code under test: split, then heads as consecutive groups of channels."""
    return {name: z.reshape(*z.shape[:2], heads, -1).transpose(1, 2) for name, z in zip("qkv", qkv.chunk(3, dim=-1))}


def pytorch_loss(qkv_s, qkv_t, heads, relations, weights=None):
    """What a user would write, in the dtype of the inputs throughout."""
    student, teacher = heads_of(qkv_s, heads), heads_of(qkv_t, heads)
    loss = 0
    for (x, y), weight in zip(relations, weights or [1] * len(relations)):
        log_s, log_t = (
            torch.log_softmax((z[x] @ z[y].mT) * z[x].shape[-1] ** -0.5, dim=-1) for z in (student, teacher)
        )
        kl = nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none")
        loss = loss + weight * kl.sum(-1).mean()
    return loss


def loss_and_grad(function, qkv_s, qkv_t, *args, upstream=1.0, **kwargs):
    qkv_s = qkv_s.detach().requires_grad_()
    loss = function(qkv_s, qkv_t, *args, **kwargs)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    (upstream * loss).backward()
    return loss.detach(), qkv_s.grad


def assert_relation_loss_as_exact(assert_as_exact, qkv_s, qkv_t, heads, relations, backend, upstream=1.0):
    dtype = qkv_s.dtype
    kwargs = {"relation_heads": heads, "relations": relations, "backend": backend, "upstream": upstream}
    ours = loss_and_grad(relation_loss, qkv_s, qkv_t, **kwargs)
    theirs = loss_and_grad(pytorch_loss, qkv_s, qkv_t, heads, relations, upstream=upstream)
    exact = loss_and_grad(pytorch_loss, qkv_s.double(), qkv_t.double(), heads, relations, upstream=upstream)
    assert ours[1].dtype == dtype
    for name, *results in zip(("loss", "d_qkv_s"), ours, theirs, exact):
        assert_as_exact(name, *results, dtype if name != "loss" else ours[0].dtype)
