"""relation_loss: the relation losses of two packed qkv projections, with one packed gradient; op and module."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from tinymim_fast.kernels import backends, reference
from tinymim_fast.kernels.checks import (
    check_lengths,
    check_no_tangent,
    check_projections,
    check_relation_heads,
    check_relations,
    outside_inference,
    weights_by_relation,
)
from tinymim_fast.kernels.reduction import (
    count_rows,
    mean_is_folded,
    mean_rows,
    reduce_rows,
    refuse_second_derivative,
    upstream_applied,
)


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
        losses = _reference_losses(qkv_s, outside_inference(qkv_t), lengths, relation_heads, relations)
    else:
        check_no_tangent(qkv_s=qkv_s, qkv_t=qkv_t)
        want_grad = torch.is_grad_enabled() and qkv_s.requires_grad
        head_dims = [qkv.shape[2] // (3 * relation_heads) for qkv in (qkv_s, qkv_t)]
        fused = backends.resolve(backend, qkv_s.device, (qkv_s.dtype, qkv_t.dtype), head_dims)
        losses, sums = {}, []
        for group in _groups_without_shared_projection(relations):
            means, _ = _relation_loss(qkv_s, qkv_t, lengths, relation_heads, ",".join(group), fused, want_grad, True)
            losses.update(zip(group, means.unbind(), strict=True))
            sums.append(means.sum())
        return {"loss": reduce(operator.add, sums), **{relation: losses[relation] for relation in relations}}
    return {"loss": sum(losses.values()), **losses}


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
        if any(weight != 1 for weight in self.weights.values()):
            losses["loss"] = sum(weight * losses[relation] for relation, weight in self.weights.items())
        return losses

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
    consume: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean row loss of each relation, and the packed gradient (empty where not wanted), see `mean_is_folded`.

    No two relations share a projection, so each third of the gradient belongs to one relation. With `consume`, the
    caller drops the gradient, and the backward pass may write into it, see `upstream_applied`.
    """
    names = relations.split(",")
    grad = _empty_gradient(qkv_s, want_grad)
    if want_grad and len(set(relations) & set("qkv")) < 3:
        grad.zero_()
    folded = consume and mean_is_folded(qkv_s.dtype, lengths)
    rows = backends.FUSED[backend].packed_relation_kl(
        qkv_s,
        qkv_t,
        relation_heads,
        names,
        lengths=lengths,
        d_qkv=grad if want_grad else None,
        gradient_scale=1 / (qkv_s.shape[0] * relation_heads * qkv_s.shape[1]) if folded else 1.0,
    )
    return mean_rows(rows, lengths), grad


@_relation_loss.register_fake
def _(qkv_s, qkv_t, lengths, relation_heads, relations, backend, want_grad, consume=False):
    means = qkv_s.new_empty(len(relations.split(",")), dtype=reference.working_dtype(qkv_s, qkv_t))
    return means, _empty_gradient(qkv_s, want_grad)


def _setup_context(ctx, inputs, output):
    qkv_s, _, lengths, ctx.relation_heads, relations, backend, _, consume = inputs
    ctx.relations = relations.split(",")
    ctx.num_images, ctx.num_tokens, _ = qkv_s.shape
    _, grad = output
    ctx.consumer = backend if consume else None
    ctx.folded = consume and mean_is_folded(qkv_s.dtype, lengths)
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, lengths)


def _backward(ctx, d_means, *_):
    refuse_second_derivative()
    if d_means is None:
        return (None,) * 8
    grad, lengths = ctx.saved_tensors
    count = 1 if ctx.folded else count_rows(ctx.num_images, ctx.relation_heads, ctx.num_tokens, lengths)
    # Of each projection, its relation; in no relation its gradient is 0, whatever the factor.
    relations = tuple(next((i for i, names in enumerate(ctx.relations) if name in names), 0) for name in "qkv")
    return upstream_applied(grad, d_means, relations, count, ctx.consumer, grad.shape[2] // 3), *[None] * 7


_relation_loss.register_autograd(_backward, setup_context=_setup_context)


def _empty_gradient(qkv_s: Tensor, want_grad: bool) -> Tensor:
    return qkv_s.new_empty(qkv_s.shape if want_grad else 0)


def _reference_losses(
    qkv_s: Tensor, qkv_t: Tensor, lengths: Tensor | None, relation_heads: int, relations: Sequence[str]
) -> dict[str, Tensor]:
    student, teacher = reference.projections(qkv_s, relation_heads), reference.projections(qkv_t, relation_heads)
    losses = {}
    for x, y in relations:
        rows = reference.relation_kl(
            student[x],
            student[y],
            teacher[x],
            teacher[y],
            scale_s=student[x].shape[3] ** -0.5,
            scale_t=teacher[x].shape[3] ** -0.5,
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
