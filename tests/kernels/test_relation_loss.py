"""relation_loss and RelationLoss on packed projections, against the formula in fp64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.relations import assert_relation_loss_as_exact, heads_of, loss_and_grad, packed, pytorch_loss
from tinymim_fast.kernels import RelationLoss, relation_kl, relation_loss

pytestmark = pytest.mark.usefixtures("loops")
BACKENDS = ["reference", "chunked"]

# (B, N, heads, D_s, D_t)
SHAPES = [
    pytest.param((1, 197, 12, 16, 64), id="tiny-from-base"),
    pytest.param((1, 197, 16, 48, 64), id="base-from-large"),
    pytest.param((2, 196, 16, 12, 80), id="no-class-token-narrowest-head-huge-teacher"),
    pytest.param((3, 50, 5, 24, 64), id="odd-batch-and-heads"),
    pytest.param((2, 1, 12, 16, 64), id="one-token-has-no-loss"),
]
# Each projection in one relation, two relations on one projection, a projection in none, all.
RELATIONS = [("qk", "vv"), ("vv", "qk"), ("qq", "kk", "vv"), ("qk", "qq"), ("vv",), ("qk",), ("qk", "vv", "qq", "kk")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(shape, backend, assert_as_exact, poisoned):
    assert_relation_loss_as_exact(assert_as_exact, *packed(shape), shape[2], ("qk", "vv"), backend)


@pytest.mark.parametrize("relations", RELATIONS, ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_relations_and_dtypes(relations, backend, dtype, assert_as_exact, poisoned):
    # 4096 is what loss scaling sends back in fp16.
    qkv_s, qkv_t = packed((3, 20, 5, 12, 16), dtype)
    assert_relation_loss_as_exact(assert_as_exact, qkv_s, qkv_t, 5, relations, backend, upstream=4096.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_are_the_relations_and_differentiable(backend):
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8), torch.float64)
    student, teacher = heads_of(qkv_s, 3), heads_of(qkv_t, 3)
    qkv_s.requires_grad_()
    losses = relation_loss(qkv_s, qkv_t, relation_heads=3, relations=("vv", "qk", "qq"), backend=backend)
    assert list(losses) == ["loss", "vv", "qk", "qq"]
    for x, y in ("vv", "qk", "qq"):
        expected = relation_kl(student[x], student[y], teacher[x], teacher[y], backend="reference")
        torch.testing.assert_close(losses[x + y], expected)
        (grad,) = torch.autograd.grad(losses[x + y], qkv_s, retain_graph=True)
        _, exact = loss_and_grad(pytorch_loss, qkv_s, qkv_t, 3, [x + y])
        torch.testing.assert_close(grad, exact)
    torch.testing.assert_close(losses["loss"], losses["vv"] + losses["qk"] + losses["qq"])


def test_regroups_heads():
    """Relation heads are groups of channels: any number that divides both widths."""
    qkv_s, qkv_t = packed((2, 10, 12, 2, 4), torch.float64)
    for heads in (1, 2, 3, 4, 6, 12, 24):
        loss = relation_loss(qkv_s, qkv_t, relation_heads=heads)["loss"]
        torch.testing.assert_close(loss, pytorch_loss(qkv_s, qkv_t, heads, ("qk", "vv")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, poisoned):
    """As the mean over the cut images' rows; NaN beyond the length is not read; gradient there is 0."""
    qkv_s, qkv_t = packed((3, 10, 3, 4, 8), torch.float64)
    lengths = torch.tensor([10, 0, 4])
    for image, length in enumerate(lengths.tolist()):
        qkv_s[image, length:] = qkv_t[image, length:] = torch.nan
    loss, grad = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=3, lengths=lengths, backend=backend)
    means = [pytorch_loss(s[None, :n], t[None, :n], 3, ("qk", "vv")) for s, t, n in zip(qkv_s, qkv_t, lengths) if n]
    torch.testing.assert_close(loss, (10 * means[0] + 4 * means[1]) / 14)
    assert (grad[1] == 0).all() and (grad[2, 4:] == 0).all() and grad.isfinite().all()
    _, cut = loss_and_grad(pytorch_loss, qkv_s[2:, :4], qkv_t[2:, :4], 3, ("qk", "vv"), upstream=4 / 14)
    torch.testing.assert_close(grad[2:, :4], cut)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    qkv_s, qkv_t = packed((2, 3, 1, 2, 3), torch.float64)
    lengths = torch.tensor([3, 2])
    for relations in (("qk", "vv"), ("qq", "qk")):
        assert torch.autograd.gradcheck(
            lambda qkv, r=relations: tuple(
                relation_loss(qkv, qkv_t, relation_heads=1, relations=r, lengths=lengths, backend=backend).values()
            ),
            (qkv_s.requires_grad_(),),
        )


def test_one_packed_gradient():
    """No second tensor of the packed gradient's size in the forward pass: neither copies nor parts."""
    qkv_s, qkv_t = packed((8, 10, 3, 64, 8))
    qkv_s.requires_grad_()
    storages = set()

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for z in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(z, torch.Tensor) and z.untyped_storage().nbytes() >= qkv_s.nbytes:
                    storages.add(z.untyped_storage().data_ptr())
            return result

    with Allocations():
        relation_loss(qkv_s, qkv_t, relation_heads=3)
    assert len(storages - {qkv_s.data_ptr()}) == 1


def test_without_gradient_none_is_computed():
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    plain = relation_loss(qkv_s, qkv_t, relation_heads=3)["loss"]
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(relation_loss(qkv_s.requires_grad_(), qkv_t, relation_heads=3)["loss"], plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_under_inference_mode(backend):
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    expected = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=3, backend=backend)
    with torch.inference_mode():
        qkv_t = qkv_t.clone()
    ours = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_forward_mode_is_refused_not_zero():
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8), torch.float64)
    with pytest.raises(RuntimeError, match=r"^qkv_s: got a tangent"):
        torch.func.jvp(lambda qkv: relation_loss(qkv, qkv_t, relation_heads=3)["loss"], (qkv_s,), (qkv_s,))


def test_backward_twice():
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    loss = relation_loss(qkv_s.requires_grad_(), qkv_t, relation_heads=3)["loss"]
    (first,), (second,) = (torch.autograd.grad(loss, qkv_s, retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)


def test_strided_projection(assert_as_exact):
    """A slice of a wider tensor, and tokens outermost as in sequence-first models."""
    heads, relations = 3, ("qk", "vv")
    qkv_s, qkv_t = packed((4, 10, 3, 4, 8))
    wide = torch.cat([qkv_s, qkv_s], dim=-1)[:, 1:, : qkv_s.shape[-1]]
    tokens_first = qkv_s.transpose(0, 1).contiguous().transpose(0, 1)
    assert_relation_loss_as_exact(assert_as_exact, wide, qkv_t[:, 1:], heads, relations, "chunked")
    assert_relation_loss_as_exact(assert_as_exact, tokens_first, qkv_t, heads, relations, "chunked")


@pytest.mark.parametrize("weights", [{"vv": 0.5, "qk": 2.0}, [2.0, 0.5]], ids=["by-name", "in-order"])
def test_module_weights(weights):
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8), torch.float64)
    module = RelationLoss(3, weights=weights)
    losses = module(qkv_s, qkv_t)
    unweighted = relation_loss(qkv_s, qkv_t, relation_heads=3)
    assert losses["qk"] == unweighted["qk"] and losses["vv"] == unweighted["vv"]
    ours = loss_and_grad(module, qkv_s, qkv_t)
    exact = loss_and_grad(pytorch_loss, qkv_s, qkv_t, 3, ("qk", "vv"), weights=[2.0, 0.5])
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b)


def test_module_is_the_function_and_has_no_state():
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    module, lengths = RelationLoss(3, relations=("vv",)), torch.tensor([10, 3])
    assert not module.state_dict()
    expected = relation_loss(qkv_s, qkv_t, relation_heads=3, relations=("vv",), lengths=lengths)
    assert module(qkv_s, qkv_t, lengths=lengths) == expected


@pytest.mark.parametrize("relations", ["qk,vv", "qk"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([10, 0])], ids=["whole", "lengths"])
def test_registration(relations, lengths):
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    op = torch.ops.tinymim_fast.relation_loss.default
    torch.library.opcheck(op, (qkv_s.requires_grad_(), qkv_t, lengths, 3, relations, "chunked", True))


@pytest.mark.parametrize("relations", [("qk", "vv"), ("qk", "qq")], ids="+".join)
def test_compiles_into_one_graph(relations):
    qkv_s, qkv_t = packed((2, 10, 3, 4, 8))
    module = RelationLoss(3, relations=relations, weights=[2.0, 1.0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(loss_and_grad(module, qkv_s, qkv_t), loss_and_grad(compiled, qkv_s, qkv_t)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


BAD = {
    "qkv_s: got list": {"qkv_s": [1.0]},
    "qkv_s: got shape": {"qkv_s": torch.zeros(2, 36)},
    "qkv_t: got shape .* all at least 1": {"qkv_t": torch.zeros(2, 0, 72)},
    "qkv_s: got width 35, want .* relation_heads=3": {"qkv_s": torch.zeros(2, 10, 35)},
    "qkv_t: got width 30, want .* relation_heads=3": {"qkv_t": torch.zeros(2, 10, 30)},
    "qkv_s: got dtype torch.int64, want": {"qkv_s": torch.zeros(2, 10, 36, dtype=torch.long)},
    "qkv_s: got strides .*, want": {"qkv_s": torch.zeros(2, 36, 10).mT},
    "qkv_t: got .B, N. = .2, 9., want": {"qkv_t": torch.zeros(2, 9, 72)},
    "qkv_t: got device meta, want cpu": {"qkv_t": torch.zeros(2, 10, 72, device="meta")},
    "qkv_t: got requires_grad=True, want .*no_grad": {"qkv_t": torch.zeros(2, 10, 72, requires_grad=True)},
    "relation_heads: got 0, want": {"relation_heads": 0},
    "relation_heads: got 3.0, want": {"relation_heads": 3.0},
    "relations: got 'qk', want a sequence": {"relations": "qk"},
    "relations: got .., want .* at least one": {"relations": ()},
    "relations: got .'kv',., want": {"relations": ("kv",)},
    "relations: got .'qk', 'qk'., want no duplicates": {"relations": ("qk", "qk")},
    "backend: got 'cuda', want": {"backend": "cuda"},
    "lengths: got values from 1 to 11, want 0 to 10": {"lengths": torch.tensor([1, 11])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {**dict(zip(("qkv_s", "qkv_t"), packed((2, 10, 3, 4, 8)))), "relation_heads": 3}
    with pytest.raises(ValueError, match=f"^{message}"):
        relation_loss(**{**arguments, **BAD[message]})


@pytest.mark.parametrize("weights", [[1.0], {"qk": 1.0}, {"qk": 1.0, "qq": 1.0}, [1.0, float("nan")], 2.0])
def test_bad_weights_are_named(weights):
    with pytest.raises(ValueError, match=r"^weights: got .*, want one finite weight for each"):
        RelationLoss(3, weights=weights)
