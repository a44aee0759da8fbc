"""A point of relation_loss.py: its inputs, one step of a provider on them, and the gate against the formula in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import harness
import roofs
import sweep
from providers import Provider, Side, formula, projections

LIGHTLY, LIGHTLY_TEMPERATURE = "lightly", 0.07


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    """What is measured; dtype is that of all inputs."""

    benchmark: str = "relation_loss"
    sweep: str = "presets"
    preset: str = ""
    mode: str = "forward_backward"
    relations: str = "qk+vv"
    dtype: str
    layout: str = "packed"
    batch_size: int
    num_heads: int
    num_tokens: int = 197
    head_dim_s: int
    head_dim_t: int

    @property
    def is_lightly(self) -> bool:
        """LightlyTrain's relation: features of length 1 under a temperature, values alone."""
        return self.preset == LIGHTLY

    @property
    def scale(self) -> float | None:
        """A factor on the logits; None: D ** -0.5 of each side."""
        return 1 / LIGHTLY_TEMPERATURE if self.is_lightly else None

    @property
    def backward(self) -> bool:
        """Whether the gradient is part of the step."""
        return self.mode == "forward_backward"

    @property
    def relation_names(self) -> list[str]:
        """As the providers take them."""
        return self.relations.split("+")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype by its name."""
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> roofs.Shape:
        """As the roofs take it."""
        names = ("batch_size", "num_heads", "num_tokens", "head_dim_s", "head_dim_t")
        return roofs.Shape(**{name: getattr(self, name) for name in names}, itemsize=self.torch_dtype.itemsize)

    @property
    def num_rows(self) -> int:
        """Query rows of a relation."""
        return self.batch_size * self.num_heads * self.num_tokens

    def __str__(self) -> str:
        name = f"{'' if self.is_lightly else 'ViT-'}{self.preset} " if self.preset else ""
        return (
            f"{name}{self.mode} {self.relations} {self.dtype} {self.layout} "
            f"B={self.batch_size} H={self.num_heads} N={self.num_tokens} D_s={self.head_dim_s} D_t={self.head_dim_t}"
        )


@dataclass(frozen=True)
class Inputs:
    """Projections of both sides."""

    student: Side
    teacher: Side

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The student's tensors, whose gradient is wanted."""
        return (self.student,) if isinstance(self.student, Tensor) else self.student

    @property
    def num_bytes(self) -> int:
        """Of both sides."""
        teacher = (self.teacher,) if isinstance(self.teacher, Tensor) else self.teacher
        return sum(z.nbytes for z in (*self.leaves, *teacher))


def make_inputs(point: Point, device: torch.device, seed: int) -> Inputs:
    """Standard normal projections: logits of standard deviation 1; of length 1 for LightlyTrain's relation."""
    generator = torch.Generator(device).manual_seed(seed)
    b, h, n = point.batch_size, point.num_heads, point.num_tokens

    def side(head_dim: int) -> Side:
        shape = (b, n, 3 * h * head_dim) if point.layout == "packed" else (b, h, n, head_dim)
        tensors = [
            torch.randn(shape, device=device, generator=generator) for _ in range(1 if point.layout == "packed" else 3)
        ]
        tensors = tuple((normalize(z, dim=-1) if point.is_lightly else z).to(point.torch_dtype) for z in tensors)
        return tensors[0] if point.layout == "packed" else tensors

    inputs = Inputs(student=side(point.head_dim_s), teacher=side(point.head_dim_t))
    for leaf in inputs.leaves:
        leaf.requires_grad_(point.backward)
    return inputs


def make_input_sets(point: Point, device: torch.device) -> list[Inputs]:
    """Three, or as many as are twice as large as the L2 cache of a GPU."""
    sets = [make_inputs(point, device, seed=0)]
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**27) if device.type == "cuda" else 0
    num_sets = max(3, math.ceil(2 * l2_bytes / sets[0].num_bytes))
    return sets + [make_inputs(point, device, seed) for seed in range(1, num_sets)]


def evaluate(provider: Provider, point: Point, inputs: Inputs, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and in mode forward_backward `upstream` times its gradient by the student's tensors."""
    arguments = inputs.student, inputs.teacher, point.num_heads, point.relation_names, point.scale
    if not point.backward:
        with torch.no_grad():
            return provider(*arguments), ()
    loss = provider(*arguments)
    return loss.detach(), torch.autograd.grad(loss, inputs.leaves, upstream, allow_unused=True)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The loss of all images and the gradient of `images`, in fp64, and the errors of plain PyTorch in the dtype."""

    images: list[int]
    loss: Tensor
    grad: Tensor | None  # (3, images, H, N, D)
    loss_error: float
    grad_error: float | None

    def gate(self, loss: Tensor, grads: tuple[Tensor | None, ...], point: Point) -> dict[str, Any]:
        """Columns: the errors, and whether the rule of the tests lets them pass."""
        errors, plain = [harness.relative_error(loss, self.loss)], [self.loss_error]
        if self.grad is not None:
            side = grads[0] if len(grads) == 1 else tuple(torch.zeros_like(grads[0]) if g is None else g for g in grads)
            grad = torch.stack([z[self.images] for z in projections(side, point.num_heads).values()])
            errors.append(harness.relative_error(grad, self.grad))
            plain.append(self.grad_error)
        columns = {name: float(f"{error:.2e}") for name, error in zip(("loss_error", "grad_error"), errors)}
        if all(harness.passes_gate(e, of_plain, point.torch_dtype) for e, of_plain in zip(errors, plain)):
            return {**columns, "status": harness.OK}
        found, allowed = (", ".join(f"{e:.1e}" for e in pair) for pair in (errors, plain))
        detail = f"errors {found}; plain PyTorch's are {allowed}"
        return {**columns, "status": harness.FAILED_GATE, "detail": detail}


def make_oracle(point: Point, inputs: Inputs, map_bytes: int = 2**26) -> Oracle:
    """`formula` in fp64 and in the dtype, gradients of the sum of the rows, of the first, the middle and the last
    image.

    Few heads at a time, `map_bytes` a map in fp64: the maps of a whole batch would not fit beside a large one.
    """
    fitting = max(1, map_bytes // (8 * point.num_tokens**2))
    images = sorted({0, point.batch_size // 2, point.batch_size - 1})
    (loss, grad), (plain_loss, plain_grad) = (
        by_formula(point, inputs, images, dtype, fitting) for dtype in (torch.float64, point.torch_dtype)
    )
    return Oracle(
        images=images,
        loss=loss,
        grad=grad,
        loss_error=harness.relative_error(plain_loss, loss),
        grad_error=None if grad is None else harness.relative_error(plain_grad, grad),
    )


def by_formula(
    point: Point, inputs: Inputs, images: list[int], dtype: torch.dtype, num_heads: int
) -> tuple[Tensor, Tensor | None]:
    """The loss of all images, and the gradient of some, (3, images, H, N, D), computed in `dtype`, `num_heads` at a
    time.
    """
    sides = [projections(side, point.num_heads) for side in (inputs.student, inputs.teacher)]
    loss = torch.zeros((), dtype=torch.float64, device=inputs.leaves[0].device)
    grad = torch.zeros(3, len(images), *sides[0]["q"].shape[1:], dtype=dtype, device=loss.device)
    for image in range(point.batch_size):
        for heads in (slice(first, first + num_heads) for first in range(0, point.num_heads, num_heads)):
            s, t = ({k: z[image : image + 1, heads].detach().to(dtype) for k, z in side.items()} for side in sides)
            leaves = [z.requires_grad_(point.backward and image in images) for z in s.values()]
            mean = formula(s, t, point.relation_names, point.scale)
            num_rows = s["q"].shape[1] * point.num_tokens
            loss += mean.detach().double() * num_rows / point.num_rows
            if mean.requires_grad:
                upstream = torch.full_like(mean, num_rows)
                of_leaves = torch.autograd.grad(mean, leaves, upstream, materialize_grads=True, allow_unused=True)
                grad[:, images.index(image), heads] = torch.cat(of_leaves)
    return loss, grad if point.backward else None
