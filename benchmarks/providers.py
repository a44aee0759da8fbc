"""What relation_loss.py compares: the paper's code, what a user would write, what a user would try next, and ours.

Each takes the student's and the teacher's projections, the number of heads, names such as "qk", and a factor on the
logits (None: D ** -0.5), and returns the sum of the relations' mean row divergences. Peers run under autocast in half
precision, as in a training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from tinymim_fast.kernels import relation_kl, relation_loss

# (B, N, 3 C), or q, k and v as (B, H, N, D) each.
Side = Tensor | tuple[Tensor, Tensor, Tensor]
Provider = Callable[[Side, Side, int, Sequence[str], float | None], Tensor]


def projections(side: Side, num_heads: int) -> dict[str, Tensor]:
    """Views "q", "k" and "v", each (B, H, N, D)."""
    if isinstance(side, Tensor):
        side = side.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return dict(zip("qkv", side))


def logits(x: Tensor, y: Tensor, scale: float | None) -> Tensor:
    """(B, H, N, N) scaled products."""
    return (x @ y.mT) * (x.shape[-1] ** -0.5 if scale is None else scale)


def autocast(side: Side) -> torch.autocast:
    """As in a training loop: products in half precision, softmax and logarithm in fp32."""
    z = side if isinstance(side, Tensor) else side[0]
    half = z.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(z.device.type, dtype=z.dtype if half else None, enabled=half)


def formula(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], relations: Sequence[str], scale: float | None = None
) -> Tensor:
    """The sum of the relations' mean row divergences, as PyTorch's documentation advises: log_softmax on both sides."""
    loss = 0
    for x, y in relations:
        log_s = torch.log_softmax(logits(student[x], student[y], scale), dim=-1)
        log_t = torch.log_softmax(logits(teacher[x], teacher[y], scale), dim=-1)
        loss = loss + nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()
    return loss


def official(
    student: Side, teacher: Side, num_heads: int, relations: Sequence[str], scale: float | None = None
) -> Tensor:
    """As the paper's code computes it: softmax twice, then the logarithm of the student's."""
    with autocast(student):
        of_student, of_teacher = projections(student, num_heads), projections(teacher, num_heads)
        kl = nn.KLDivLoss(reduction="none")
        loss = 0
        for x, y in relations:
            log_s = torch.softmax(logits(of_student[x], of_student[y], scale), dim=-1).log()
            p_t = torch.softmax(logits(of_teacher[x], of_teacher[y], scale), dim=-1)
            loss = loss + kl(log_s, p_t).sum(-1).mean()
        return loss


def eager(student: Side, teacher: Side, num_heads: int, relations: Sequence[str], scale: float | None = None) -> Tensor:
    """`formula` under autocast."""
    with autocast(student):
        return formula(projections(student, num_heads), projections(teacher, num_heads), relations, scale)


def padded(
    student: Side, teacher: Side, num_heads: int, relations: Sequence[str], scale: float | None = None
) -> Tensor:
    """`eager` with N padded to a multiple of 8, so that the rows of the maps are aligned, and the padding masked."""
    with autocast(student):
        of_student, of_teacher = projections(student, num_heads), projections(teacher, num_heads)
        num_tokens = of_student["q"].shape[2]
        padding = -num_tokens % 8
        mask = torch.arange(num_tokens + padding, device=of_student["q"].device) >= num_tokens

        def log_relation(of_side: Mapping[str, Tensor], x: str, y: str) -> Tensor:
            x, y = (nn.functional.pad(of_side[name], (0, 0, 0, padding)) for name in (x, y))
            # Finite in fp16, and its exponential is 0.
            return torch.log_softmax(logits(x, y, scale).masked_fill(mask, -3e4), dim=-1)

        loss = 0
        for x, y in relations:
            log_s, log_t = log_relation(of_student, x, y), log_relation(of_teacher, x, y)
            kl = nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none")
            loss = loss + kl[:, :, :num_tokens].sum(-1).mean()
        return loss


@cache
def compiled(provider: Provider) -> Provider:
    """Compiled for each shape anew, with the first call: the compiler takes seconds to import."""
    return torch.compile(provider, dynamic=False)


def ours(backend: str) -> Provider:
    """A backend of this package, by whichever public function takes the layout."""

    def loss(
        student: Side, teacher: Side, num_heads: int, relations: Sequence[str], scale: float | None = None
    ) -> Tensor:
        if isinstance(student, Tensor):
            assert scale is None, "packed projections have the scale of their width"
            return relation_loss(student, teacher, relation_heads=num_heads, relations=relations, backend=backend)[
                "loss"
            ]
        s, t = projections(student, num_heads), projections(teacher, num_heads)
        scales = {"scale_s": scale, "scale_t": scale}
        return sum(relation_kl(s[x], s[y], t[x], t[y], **scales, backend=backend) for x, y in relations)

    return loss


PROVIDERS: dict[str, Provider] = {
    "official": official,
    "eager": eager,
    "compile": lambda *args: compiled(eager)(*args),
    "compile_padded": lambda *args: compiled(padded)(*args),
    "chunked": ours("chunked"),
    "triton": ours("triton"),
}
