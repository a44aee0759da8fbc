"""The rule of every numerical test."""

import torch
from torch import Tensor

from tinymim_fast.kernels.reference import FLOORS


def assert_as_exact(name: str, ours: Tensor, pytorch: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """error(ours) <= 2 * error(PyTorch in the same dtype) + floor, errors against fp64."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
    errors = (ours.double() - exact).abs()
    allowed = 2 * (pytorch.double() - exact).abs().max() + FLOORS[dtype] * exact.abs().max()
    allowed = allowed + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    worst = errors.nan_to_num(nan=float("inf")).argmax().item()
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), errors.shape))
    assert (errors <= allowed).all(), f"{name}: largest error {errors.max():.3e} at {where}, allowed {allowed:.3e}"
