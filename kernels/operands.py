"""The tensors of a loss as the kernels' arguments, and a launch of a kernel on them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Inputs, places for the gradients, and how relations pick their projections.

    Args:
        x_s, y_s, x_t, y_t: (B, H, N, D), the last dimension contiguous; x and y of one side have the same strides, see
            `with_shared_strides`. Of packed projections, views of the first one.
        d_x, d_y: places for the gradients, with the same strides; None where not wanted.
        scale_s, scale_t: factors on the logits.
        lengths: (B,) integers or None.
        weights: (B, H, N) upstream gradient of the rows or None, for a single relation. A backward pass: the row
            losses are not computed.
        relations: of each, the projections it takes as x and as y; where both are one, d_x and d_y are one as well
            and get the sum of both gradients.
        stride_s_p, stride_t_p, stride_d_p: elements from one projection to the next.
        gradient_scale: a factor on the gradients, taken in fp32 before they are rounded.
    """

    x_s: Tensor
    y_s: Tensor
    x_t: Tensor
    y_t: Tensor
    d_x: Tensor | None
    d_y: Tensor | None
    scale_s: float
    scale_t: float
    lengths: Tensor | None = None
    weights: Tensor | None = None
    relations: tuple[tuple[int, int], ...] = ((0, 1),)
    stride_s_p: int = 0
    stride_t_p: int = 0
    stride_d_p: int = 0
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        for x, y in ((self.x_s, self.y_s), (self.x_t, self.y_t), (self.d_x, self.d_y)):
            assert x is None or y is None or _strides(x) == _strides(y), f"{x.stride()} and {y.stride()}"

    def empty_rows(self) -> Tensor | None:
        """Room for the row losses, (B, relations, H, N)."""
        if self.weights is not None:
            return None
        num_images, num_heads, num_tokens, _ = self.x_s.shape
        return torch.empty(num_images, len(self.relations), num_heads, num_tokens, device=self.x_s.device)

    @cached_property
    def normalized_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """(B, H, N) weights within -1 and 1, and the factor (B, H): weights of 1e-6 would underflow in fp16."""
        if self.weights is None:
            return None, None
        weights = self.weights.float()
        factors = weights.abs().amax(dim=-1)
        return (weights / factors.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).contiguous(), factors

    def largest_offset(self) -> int:
        """Elements from the first to the last token of a head, at most."""
        tensors = (self.x_s, self.x_t, self.d_x, self.d_y)
        return max(z.shape[2] * abs(z.stride(2)) for z in tensors if z is not None)

    def arguments(self) -> dict:
        """By the names that all kernels share; each takes those of its signature.

        `projections` has four bits a relation: two for x, then two for y.
        """
        weights, weight_scales = self.normalized_weights
        stride_s_b, stride_s_h, stride_s_n = _strides(self.x_s)
        stride_t_b, stride_t_h, stride_t_n = _strides(self.x_t)
        gradient = self.d_y if self.d_x is None else self.d_x
        stride_d_b, stride_d_h, stride_d_n = (0, 0, 0) if gradient is None else _strides(gradient)
        return {
            "x_s_ptr": self.x_s,
            "y_s_ptr": self.y_s,
            "x_t_ptr": self.x_t,
            "y_t_ptr": self.y_t,
            "d_x_ptr": self.d_x,
            "d_y_ptr": self.d_y,
            "lengths_ptr": None if self.lengths is None else self.lengths.contiguous(),
            "weights_ptr": weights,
            "weight_scales_ptr": weight_scales,
            "stride_s_b": stride_s_b,
            "stride_s_h": stride_s_h,
            "stride_s_n": stride_s_n,
            "stride_s_p": self.stride_s_p,
            "stride_t_b": stride_t_b,
            "stride_t_h": stride_t_h,
            "stride_t_n": stride_t_n,
            "stride_t_p": self.stride_t_p,
            "stride_d_b": stride_d_b,
            "stride_d_h": stride_d_h,
            "stride_d_n": stride_d_n,
            "stride_d_p": self.stride_d_p,
            "num_heads": self.x_s.shape[1],
            "num_relations": len(self.relations),
            "num_tokens": self.x_s.shape[2],
            "projections": sum((x | y << 2) << (4 * i) for i, (x, y) in enumerate(self.relations)),
            "bits_s": self.scale_s * LOG2_E,
            "bits_t": self.scale_t * LOG2_E,
            "scale_d": self.scale_s * self.gradient_scale,
            "HEAD_DIM_S": self.x_s.shape[3],
            "HEAD_DIM_T": self.x_t.shape[3],
            "PRECISION_S": input_precision(self.x_s),
            "PRECISION_T": input_precision(self.x_t),
            "PTX": self.x_s.is_cuda and torch.version.hip is None,
        }


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. A plan of them runs, or is compiled ahead of time with tensors on "meta".

    Args:
        kernel: decorated by triton.jit.
        grid: programs by axis.
        arguments: all of the kernel's, by name.
        num_warps: of a program.
    """

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict
    num_warps: int

    def run(self) -> Any:
        """Launches on the current device and stream; returns the compiled kernel, None from the interpreter."""
        return self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)


def launch(kernel: Callable, grid: tuple[int, ...], arguments: dict, num_warps: int) -> Launch:
    """The launch with those of the arguments that the kernel has in its signature."""
    return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, num_warps)


def with_shared_strides(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of one side, copied where their strides differ: the kernels have one set for both."""
    return (x, y) if _strides(x) == _strides(y) else (x.contiguous(), y.contiguous())


def padded(size: int) -> int:
    """Tiles are powers of two, and a matrix instruction takes at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def input_precision(z: Tensor) -> str:
    """Of fp32 products: as PyTorch's own, exact unless the user allowed TF32."""
    allowed = z.is_cuda and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def _strides(z: Tensor) -> tuple[int, ...]:
    """Of images, heads and tokens; 0 where there is one, whose stride says nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(z.shape[:3], z.stride()[:3]))
