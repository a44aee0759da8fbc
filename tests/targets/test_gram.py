"""Relations without softmax: Gram matrices against the N x N maps, near convergence too."""

import pytest
import torch

from support.exact import assert_as_exact
from tinymim_fast.targets.gram import relation_mse


def materialised(x_s, y_s, x_t, y_t):
    maps = [x @ y.mT * x.shape[-1] ** -0.5 for x, y in ((x_s, y_s), (x_t, y_t))]
    return ((maps[0] - maps[1]) ** 2).mean()


def inputs(gap, dtype, dims=(16, 16)):
    """A teacher, and a student that differs from it by about `gap` of its size; of other widths, by all of it."""
    generator = torch.Generator().manual_seed(0)
    x_t, y_t = (torch.randn(2, 3, 50, dims[1], generator=generator, dtype=torch.float64) for _ in range(2))
    x_s, y_s = (torch.randn(2, 3, 50, dims[0], generator=generator, dtype=torch.float64) for _ in range(2))
    if gap is not None:
        x_s, y_s = x_t + gap * x_s, y_t + gap * y_s
    return [z.to(dtype) for z in (x_s, y_s, x_t, y_t)]


def loss_and_gradients(function, x_s, y_s, x_t, y_t):
    x_s, y_s = x_s.detach().requires_grad_(), y_s.detach().requires_grad_()
    loss = function(x_s, y_s, x_t, y_t)
    return loss.detach(), *torch.autograd.grad(loss, (x_s, y_s))


@pytest.mark.parametrize(
    ("dtype", "gap", "dims"),
    [
        (torch.float64, None, (12, 40)),  # other widths, as of student and teacher
        (torch.float32, None, (12, 40)),
        (torch.bfloat16, None, (12, 40)),
        (torch.float32, 1e-2, (16, 16)),
        (torch.float32, 1e-4, (16, 16)),
        (torch.float32, 1e-6, (16, 16)),  # where fp32 can hold little more of the difference
        (torch.bfloat16, 3e-2, (16, 16)),
    ],
    ids=str,
)
def test_as_exact_as_the_materialised_form(dtype, gap, dims):
    """No further from fp64 than the maps in the inputs' dtype, by the rule of the kernels."""
    tensors = inputs(gap, dtype, dims)
    ours = loss_and_gradients(relation_mse, *tensors)
    theirs = loss_and_gradients(materialised, *tensors)
    exact = loss_and_gradients(materialised, *(z.double() for z in tensors))
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, theirs, exact):
        assert_as_exact(name, *results, ours[0].dtype if name == "loss" else dtype)


def test_equal_relations_give_zero_and_no_negative_loss():
    for dtype in (torch.float32, torch.bfloat16):
        x, y, *_ = inputs(None, dtype)
        loss, d_x, d_y = loss_and_gradients(relation_mse, x, y, x, y)
        scale = float(materialised(x.double(), y.double(), 0 * x.double(), y.double()))
        assert 0 <= float(loss) < 1e-6 * scale
        assert float(d_x.abs().max()) < 1e-2 * scale / x.shape[-2] and float(d_y.abs().max()) < 1e-2 * scale


def test_no_map_of_tokens_is_made():
    """Of 4,096 tokens a map would be 64 MiB; the largest tensor made is a copy of a projection."""
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(z.numel() for z in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(z))
            return out

    x = torch.randn(1, 1, 4096, 8, requires_grad=True)
    with Largest():
        relation_mse(x, x, x.detach() * 2, x.detach() * 2).backward()
    assert max(largest) == x.numel()


def test_the_gradient_is_autograds_of_the_formula_by_differences():
    tensors = inputs(1e-1, torch.float64)
    x_s, y_s, x_t, y_t = (z[:1, :1, :5, :4].clone() for z in tensors)
    assert torch.autograd.gradcheck(
        lambda a, b: relation_mse(a, b, x_t, y_t), (x_s.requires_grad_(), y_s.requires_grad_())
    )
