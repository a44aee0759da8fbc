"""The tensors of a loss as the kernels' arguments, and a launch of a kernel on them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Inputs, places for the gradients, and how relations pick their projections.

    Args:
        x_s, y_s, x_t, y_t: (B, H, N, D), any strides with the last dimension contiguous. Of packed projections,
            views of the first one.
        d_x, d_y: places for the gradients, None where not wanted.
        codes_x, codes_y: of each relation, the projection it takes as x and as y; where both are one, d_x and d_y
            are one as well and get the sum of both gradients.
        stride_s_p, stride_t_p, stride_d_p: elements from one projection to the next.
        lengths: (B,) integers or None.
        weights: (B, H, N) upstream gradient of the rows or None, for a single relation. A backward pass: the row
            losses are not computed.
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
    codes_x: tuple[int, ...] = (0,)
    codes_y: tuple[int, ...] = (1,)
    stride_s_p: int = 0
    stride_t_p: int = 0
    stride_d_p: int = 0

    @property
    def num_relations(self) -> int:
        return len(self.codes_x)

    def empty_rows(self) -> Tensor | None:
        """Room for the row losses, (B, relations, H, N)."""
        if self.weights is not None:
            return None
        num_images, num_heads, num_tokens, _ = self.x_s.shape
        return torch.empty(num_images, self.num_relations, num_heads, num_tokens, device=self.x_s.device)

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
        tensors = (self.x_s, self.y_s, self.x_t, self.y_t, self.d_x, self.d_y)
        return max(z.shape[2] * abs(z.stride(2)) for z in tensors if z is not None)

    def arguments(self) -> dict:
        """By the names that all kernels share."""
        weights, weight_scales = self.normalized_weights
        head_dim_s, head_dim_t = self.x_s.shape[3], self.x_t.shape[3]
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
            **_strides("x_s", self.x_s),
            **_strides("y_s", self.y_s),
            **_strides("x_t", self.x_t),
            **_strides("y_t", self.y_t),
            **_strides("d_x", self.d_x),
            **_strides("d_y", self.d_y),
            "stride_s_p": self.stride_s_p,
            "stride_t_p": self.stride_t_p,
            "stride_d_p": self.stride_d_p,
            "num_heads": self.x_s.shape[1],
            "num_relations": self.num_relations,
            "num_tokens": self.x_s.shape[2],
            "codes_x": _packed(self.codes_x),
            "codes_y": _packed(self.codes_y),
            "bits_s": self.scale_s * LOG2_E,
            "bits_t": self.scale_t * LOG2_E,
            "scale_s": self.scale_s,
            "HEAD_DIM_S": head_dim_s,
            "HEAD_DIM_T": head_dim_t,
            "BLOCK_D_S": padded(head_dim_s),
            "BLOCK_D_T": padded(head_dim_t),
            "GAIN": gain(self.x_s.dtype),
            "PRECISION_S": input_precision(self.x_s),
            "PRECISION_T": input_precision(self.x_t),
            "PTX": self.x_s.is_cuda and torch.version.hip is None,
        }


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. A plan of them runs, or is compiled ahead of time with tensors on "meta"."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict
    num_warps: int

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)


def padded(size: int) -> int:
    """Tiles are powers of two, and a matrix instruction takes at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def gain(dtype: torch.dtype) -> float:
    """A factor on p_s - p_t for the matrix unit: near convergence, fp16 would round it as a subnormal."""
    return 1024.0 if dtype == torch.float16 else 1.0


def input_precision(z: Tensor) -> str:
    """Of fp32 products: as PyTorch's own, exact unless the user allowed TF32."""
    allowed = z.is_cuda and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def _strides(name: str, z: Tensor | None) -> dict[str, int]:
    by_axis = (0, 0, 0) if z is None else z.stride()[:3]
    return {f"stride_{name}_{axis}": stride for axis, stride in zip("bhn", by_axis, strict=True)}


def _packed(codes: tuple[int, ...]) -> int:
    """Two bits a relation."""
    return sum(code << (2 * i) for i, code in enumerate(codes))
