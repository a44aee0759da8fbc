"""relation_loss: the relation losses of two packed qkv projections, with one packed gradient; op and module."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinymim_fast.kernels import backends, reference
from tinymim_fast.kernels.checks import (
    check_lengths,
    check_projections,
    check_relation_heads,
    check_relations,
    weights_by_relation,
)
from tinymim_fast.kernels.reduction import count_rows, reduce_rows, refuse_second_derivative, scaled


def relation_loss(
    qkv_s: Tensor,
    qkv_t: Tensor,
    *,
    relation_heads: int,
    relations: Sequence[str] = ("qk", "vv"),
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Sum of the relation losses between two packed qkv projections.

        loss = sum over relations xy of mean over (b, h, i) of KL(R_t[b, h, i] || R_s[b, h, i]),
        R = softmax(x y^T / sqrt(C / relation_heads))

    The projections are read where they lie and one packed gradient is written: no permuted or joined copies.
    Relations that share a projection (such as qk and qq) cost one packed gradient more. Only first
    derivatives; backend "reference" has all of them.

    Args:
        qkv_s: student, (B, N, 3 C_s), laid out as timm's `attn.qkv` gives it: q, k and v side by side, the
            heads as consecutive groups of channels; fp16, bf16, fp32 or fp64, last dimension contiguous.
        qkv_t: teacher, (B, N, 3 C_t), on the same device, without gradient; dtype and width may differ.
        relation_heads: number of heads of both sides' relations; divides C_s and C_t. It need not be the
            number of heads of either model's attention.
        relations: different ones of "qk", "vv", "qq", "kk", at least one.
        lengths: (B,) integers, as for relation_kl.
        backend: as for relation_kl.

    Returns:
        {"loss": the sum, and each relation's name: its mean row loss}, scalars in nats; fp64 where an input
        is fp64, else fp32. All are differentiable with respect to qkv_s.

    Raises:
        ValueError: an argument's shape, dtype, device, strides or value is wrong, or backend "triton" cannot take it.

    Memory: as relation_kl; kept for the backward pass is the packed gradient.

    Source: TinyMIM, CVPR 2023, arXiv 2301.01296; relation heads from MiniLMv2, arXiv 2012.15828.
    """
    backends.check(backend)
    check_relations(relations)
    check_projections(qkv_s, qkv_t, relation_heads)
    check_lengths(lengths, qkv_s, num_images=qkv_s.shape[0], num_tokens=qkv_s.shape[1])

    if backend == "reference":
        losses = _reference_losses(qkv_s, qkv_t, lengths, relation_heads, relations)
    else:
        want_grad = torch.is_grad_enabled() and qkv_s.requires_grad
        fused = backends.resolve(backend, *(_projections(qkv, relation_heads)["q"] for qkv in (qkv_s, qkv_t)))
        losses = {}
        for group in _groups_without_shared_projection(relations):
            means, _ = _relation_loss(qkv_s, qkv_t, lengths, relation_heads, ",".join(group), fused, want_grad)
            losses.update(zip(group, means.unbind(), strict=True))
    return {"loss": sum(losses.values()), **{relation: losses[relation] for relation in relations}}


class RelationLoss(nn.Module):
    """Weighted sum of the relation losses between two packed qkv projections: relation_loss as a module.

    Args:
        relation_heads, relations, backend: as for relation_loss.
        weights: weight of each relation in "loss", by name or in the order of `relations`; 1 each if None.

    Raises:
        ValueError: a weight is missing, unknown or not finite, or as relation_loss.
    """

    def __init__(
        self,
        relation_heads: int,
        relations: Sequence[str] = ("qk", "vv"),
        weights: Mapping[str, float] | Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        backends.check(backend)
        check_relations(relations)
        check_relation_heads(relation_heads)
        self.relation_heads = relation_heads
        self.relations = tuple(relations)
        self.weights = weights_by_relation(weights, self.relations)
        self.backend = backend

    def forward(self, qkv_s: Tensor, qkv_t: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss": the weighted sum, and each relation's unweighted mean row loss}, as relation_loss."""
        losses = relation_loss(
            qkv_s,
            qkv_t,
            relation_heads=self.relation_heads,
            relations=self.relations,
            lengths=lengths,
            backend=self.backend,
        )
        return {
            **losses,
            "loss": sum(self.weights[relation] * losses[relation] for relation in self.relations),
        }

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"relation_heads={self.relation_heads}, weights={self.weights}, backend={self.backend!r}"


@torch.library.custom_op("tinymim_fast::relation_loss", mutates_args=())
def _relation_loss(
    qkv_s: Tensor,
    qkv_t: Tensor,
    lengths: Tensor | None,
    relation_heads: int,
    relations: str,
    backend: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Mean row loss of each relation, and the packed gradient of the *sums* of the rows (empty where not
    wanted).

    No two relations share a projection, so each third of the gradient belongs to one relation.
    """
    names = relations.split(",")
    grad = _empty_gradient(qkv_s, want_grad)
    if want_grad and len(set(relations) & set("qkv")) < 3:
        grad.zero_()
    rows = backends.FUSED[backend].packed_relation_kl(
        _projections(qkv_s, relation_heads),
        _projections(qkv_t, relation_heads),
        names,
        scale_s=_scale(qkv_s, relation_heads),
        scale_t=_scale(qkv_t, relation_heads),
        lengths=lengths,
        d_student=_projections(grad, relation_heads) if want_grad else None,
    )
    return torch.stack([reduce_rows(of_one, lengths, "mean") for of_one in rows]), grad


@_relation_loss.register_fake
def _(qkv_s, qkv_t, lengths, relation_heads, relations, backend, want_grad):
    means = qkv_s.new_empty(len(relations.split(",")), dtype=reference.working_dtype(qkv_s, qkv_t))
    return means, _empty_gradient(qkv_s, want_grad)


def _setup_context(ctx, inputs, output):
    qkv_s, _, lengths, ctx.relation_heads, relations, *_ = inputs
    ctx.relations = relations.split(",")
    ctx.num_images, ctx.num_tokens, _ = qkv_s.shape
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, lengths)


def _backward(ctx, d_means, *_):
    refuse_second_derivative()
    if d_means is None:
        return (None,) * 7
    grad, lengths = ctx.saved_tensors
    d_sums = d_means / count_rows(ctx.num_images, ctx.relation_heads, ctx.num_tokens, lengths)
    by_relation = dict(zip(ctx.relations, d_sums.unbind(), strict=True))
    zero = torch.zeros_like(d_sums[0])
    by_projection = torch.stack(
        [next((d for relation, d in by_relation.items() if name in relation), zero) for name in "qkv"]
    )
    return scaled(grad.unflatten(2, (3, -1)), by_projection[:, None]).flatten(2), *[None] * 6


_relation_loss.register_autograd(_backward, setup_context=_setup_context)


def _empty_gradient(qkv_s: Tensor, want_grad: bool) -> Tensor:
    return qkv_s.new_empty(qkv_s.shape if want_grad else 0)


def _projections(qkv: Tensor, relation_heads: int) -> dict[str, Tensor]:
    """Views {"q", "k", "v"} of (B, N, 3 C), each (B, H, N, D)."""
    by_head = qkv.unflatten(2, (3, relation_heads, -1)).permute(2, 0, 3, 1, 4)
    return dict(zip("qkv", by_head.unbind(), strict=True))


def _scale(qkv: Tensor, relation_heads: int) -> float:
    return (qkv.shape[2] // (3 * relation_heads)) ** -0.5


def _reference_losses(
    qkv_s: Tensor, qkv_t: Tensor, lengths: Tensor | None, relation_heads: int, relations: Sequence[str]
) -> dict[str, Tensor]:
    student, teacher = _projections(qkv_s, relation_heads), _projections(qkv_t, relation_heads)
    losses = {}
    for x, y in relations:
        rows = reference.relation_kl(
            student[x],
            student[y],
            teacher[x],
            teacher[y],
            scale_s=_scale(qkv_s, relation_heads),
            scale_t=_scale(qkv_t, relation_heads),
            lengths=lengths,
        )
        losses[x + y] = reduce_rows(rows, lengths, "mean")
    return losses


def _groups_without_shared_projection(relations: Sequence[str]) -> Iterator[list[str]]:
    """The relations in as few groups as a greedy choice finds; ("qk", "vv") is one group."""
    left = list(relations)
    while left:
        group: list[str] = []
        for relation in left:
            if not set(relation) & set("".join(group)):
                group.append(relation)
        yield group
        left = [relation for relation in left if relation not in group]
