"""DeepSpeed's step with nothing asked of the device, and fewer kernels: what is replaced in it, when imported.

Of 0.19; the tests of steps count reads and kernels, and compare ranks and stages with PyTorch's own AdamW.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
from torch import nn

gradient_norm = SimpleNamespace(looked_at=False)  # by the step that DeepSpeed takes now


def _leave_gradients_on_the_device() -> None:
    """No bool of the gradient's norm in each step, but where `gradient_norm.looked_at`.

    By itself DeepSpeed makes one, drops the step in silence where the norm isn't finite, and lets the schedule lag from
    then on. Here such a step makes the weights NaN, and the loss after it, which the loop looks at; or, with
    `skip_nonfinite`, it is left out, and said to be.
    """
    for module in (
        deepspeed.runtime.bf16_optimizer,
        deepspeed.runtime.zero.stage_1_and_2,
        deepspeed.runtime.zero.stage3,
    ):
        asked = module.is_invalid_grad_norm
        module.is_invalid_grad_norm = lambda norm, asked=asked: gradient_norm.looked_at and asked(norm)
    deepspeed.runtime.bf16_optimizer.clip_tensors_by_global_norm = _clip
    deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = _global_norm
    deepspeed.runtime.bf16_optimizer.BF16_Optimizer._update_hp_grad = _add_gradient


def _clip(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: object = None) -> None:
    """DeepSpeed's, without its question whether there is anything to clip."""
    torch._foreach_mul_(input_tensors, (max_norm / (global_norm + 1e-6)).clamp(max=1.0))


def _global_norm(input_tensors: list[torch.Tensor], mpu: object = None, norm_type: float = 2.0) -> torch.Tensor:
    """DeepSpeed's, -1 where it is not finite, in a few kernels instead of one for each parameter."""
    norm = torch.stack(torch._foreach_norm(input_tensors, norm_type)).pow(norm_type).sum().pow(1 / norm_type)
    return torch.where(norm.isfinite(), norm, -1.0)


def _add_gradient(optimizer: Any, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
    """DeepSpeed's sum of a parameter's bf16 gradients in fp32, in one kernel instead of two."""
    if parameter.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    total.data.add_(parameter.grad.data.view(total.shape))
    parameter._hp_grad = total
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        parameter.grad.zero_()


_leave_gradients_on_the_device()
