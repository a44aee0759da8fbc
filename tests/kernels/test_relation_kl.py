"""relation_kl against the formula in fp64."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.programs import given, settings, st
from support.relations import assert_relation_kl_as_exact, inputs, log_relations, loss_and_grads, pytorch_kl
from tinymim_fast.kernels import chunked, reference, relation_kl
from tinymim_fast.kernels.reduction import scaled

pytestmark = pytest.mark.usefixtures("loops")
BACKENDS = ["reference", "chunked"]

# (B, H, N, D_s, D_t)
SHAPES = [
    pytest.param((2, 12, 197, 16, 64), id="tiny-from-base"),
    pytest.param((1, 12, 197, 32, 64), id="small-from-base"),
    pytest.param((1, 16, 197, 48, 64), id="base-from-large-and-chunks-of-13-and-3-heads"),
    pytest.param((1, 12, 197, 64, 64), id="equal-head-widths"),
    pytest.param((1, 16, 196, 12, 64), id="no-class-token-narrowest-head"),
    pytest.param((2, 16, 50, 24, 80), id="patch-32-from-huge"),
    pytest.param((3, 5, 50, 16, 64), id="odd-batch-and-heads"),
    pytest.param((2, 3, 1, 16, 64), id="one-token-has-no-loss"),
    pytest.param((70, 13, 50, 4, 4), id="chunks-of-several-images-the-last-ragged"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def official_kl(x_s, y_s, x_t, y_t):
    """The formula as the paper's code computes it; -inf where the student's softmax underflows."""
    student, teacher = (log.exp() for log in log_relations(x_s, y_s, x_t, y_t))
    return nn.KLDivLoss(reduction="none")(student.log(), teacher).sum(-1).mean()


def test_reference_is_the_formula():
    """The oracle's oracle: loops over the definition."""
    b, h, n, _, _ = shape = (2, 2, 3, 2, 4)
    x_s, y_s, x_t, y_t = inputs(shape, torch.float64)
    rows = reference.relation_kl(x_s, y_s, x_t, y_t, scale_s=0.7, scale_t=0.4)

    def relation(x, y, scale):
        exps = [sum(p * q for p, q in zip(x.tolist(), key.tolist())) * scale for key in y]
        exps = [2.718281828459045**e for e in exps]
        return [e / sum(exps) for e in exps]

    for index in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(n)).tolist():
        image, head, query = index
        student = relation(x_s[image, head, query], y_s[image, head], 0.7)
        teacher = relation(x_t[image, head, query], y_t[image, head], 0.4)
        kl = sum(t * torch.tensor(t / s, dtype=torch.float64).log().item() for t, s in zip(teacher, student))
        assert rows[image, head, query].item() == pytest.approx(kl, abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_in_fp32(shape, assert_as_exact, poisoned):
    assert_relation_kl_as_exact(assert_as_exact, inputs(shape), torch.float32, "chunked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_and_reductions(dtype, backend, reduction, assert_as_exact, poisoned):
    # 1000 is what loss scaling sends back in fp16.
    tensors = inputs((3, 5, 50, 16, 64), dtype)
    assert_relation_kl_as_exact(assert_as_exact, tensors, dtype, backend, 1000.0, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_have_their_own_upstream_gradients(backend, assert_as_exact, poisoned):
    tensors = inputs((2, 3, 50, 16, 64))
    upstream = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    assert_relation_kl_as_exact(assert_as_exact, tensors, torch.float32, backend, upstream, "none")


def test_agrees_with_the_official_formula():
    tensors = inputs((2, 12, 197, 16, 64), torch.float64)
    ours, official = (loss_and_grads(function, *tensors) for function in (relation_kl, official_kl))
    for a, b in zip(ours, official):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x_s, y_s, x_t, y_t = inputs((2, 1, 4, 2, 3), torch.float64)
    lengths = torch.tensor([4, 2])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, y, r=reduction: relation_kl(x, y, x_t, y_t, lengths=lengths, reduction=r, backend=backend),
            (x_s.requires_grad_(), y_s.requires_grad_()),
        )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (4, 5, 9, 7, 7))),
    lengths=st.booleans(),
    map_bytes=st.sampled_from([1, 300, 2000, 2**21]),
    scales=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_chunked_is_the_reference(shape, lengths, map_bytes, scales, reduction, seed):
    """Any shape, chunk size, lengths and scales; in fp64, where both must agree to rounding."""
    tensors = inputs(shape, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    kwargs = {
        "lengths": torch.randint(0, shape[2] + 1, shape[:1], generator=generator) if lengths else None,
        "upstream": torch.randn(shape[:3] if reduction == "none" else (), generator=generator).double(),
        "reduction": reduction,
        "scale_s": scales[0],
        "scale_t": scales[1],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CPU_MAP_BYTES", map_bytes)
        ours, exact = (loss_and_grads(relation_kl, *tensors, backend=b, **kwargs) for b in ("chunked", "reference"))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, assert_as_exact):
    """Slices of packed projections, transposed and expanded tensors, read in place."""
    qkv_s, qkv_t = (torch.randn(2, 50, 3, 4, d, generator=torch.Generator().manual_seed(d)) for d in (16, 64))
    sliced = [qkv[:, :, i].transpose(1, 2) for qkv in (qkv_s, qkv_t) for i in (0, 1)]
    transposed = [z.contiguous().transpose(0, 1) for z in sliced]
    expanded = [z[:1, :1].expand(3, 5, -1, -1) for z in sliced]
    for tensors in (sliced, transposed, expanded):
        ours = loss_and_grads(relation_kl, *tensors, backend=backend)
        exact = loss_and_grads(relation_kl, *(z.double() for z in tensors), backend="reference")
        theirs = loss_and_grads(pytorch_kl, *tensors)
        for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, theirs, exact):
            assert_as_exact(name, *results, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_requires_grad_subsets(backend, reduction, poisoned):
    x_s, y_s, x_t, y_t = inputs((2, 3, 10, 8, 8))
    both = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, reduction=reduction, backend=backend)
    for want_x, want_y in ((True, False), (False, True), (False, False)):
        x, y = x_s.clone().requires_grad_(want_x), y_s.clone().requires_grad_(want_y)
        loss = relation_kl(x, y, x_t, y_t, reduction=reduction, backend=backend)
        assert torch.equal(loss.detach(), both[0])
        assert loss.requires_grad == (want_x or want_y)
        if loss.requires_grad:
            loss.sum().backward()
        assert torch.equal(x.grad, both[1]) if want_x else x.grad is None
        assert torch.equal(y.grad, both[2]) if want_y else y.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_tensor_as_both(reduction):
    """VV: the gradient of x_s is y_s is the sum of both."""
    v_s, _, v_t, _ = inputs((2, 3, 10, 8, 8), torch.float64)
    _, d_x, d_y = loss_and_grads(relation_kl, v_s, v_s, v_t, v_t, reduction=reduction)
    v = v_s.clone().requires_grad_()
    relation_kl(v, v, v_t, v_t, reduction=reduction).sum().backward()
    torch.testing.assert_close(v.grad, d_x + d_y)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(reduction):
    x_s, y_s, x_t, y_t = inputs((2, 3, 10, 8, 8))
    x_s.requires_grad_()
    loss = relation_kl(x_s, y_s, x_t, y_t, reduction=reduction).sum()
    (first,), (second,) = (torch.autograd.grad(loss, x_s, retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivative_is_refused_not_wrong():
    x_s, y_s, x_t, y_t = inputs((1, 1, 4, 3, 3), torch.float64)
    x_s.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(relation_kl(x_s, y_s, x_t, y_t), x_s, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda x: relation_kl(x, y_s, x_t, y_t, backend="reference"), (x_s,))


def test_forward_mode_is_right_or_refused():
    """As a tangent of x_s or of the teacher, and by torch.func; the fused backends' would be 0."""
    x_s, y_s, x_t, y_t = inputs((1, 1, 4, 3, 3), torch.float64)
    tangent = torch.ones_like(x_s)
    exact = torch.func.jvp(lambda x: relation_kl(x, y_s, x_t, y_t, backend="reference"), (x_s,), (tangent,))[1]
    x_s.requires_grad_()
    (grad,) = torch.autograd.grad(relation_kl(x_s, y_s, x_t, y_t), x_s)
    torch.testing.assert_close(exact, (grad * tangent).sum())
    for reduction in ("mean", "none"):
        for function in (lambda x: relation_kl(x, y_s, x_t, y_t), lambda x: relation_kl(x_s.detach(), y_s, x, y_t)):
            with pytest.raises(RuntimeError, match="tangent of forward-mode"):
                torch.func.jvp(function, (x_t,), (tangent,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent of forward-mode"):
            relation_kl(torch.autograd.forward_ad.make_dual(x_t, tangent), y_s, x_t, y_t, reduction=reduction)
    with pytest.raises(RuntimeError, match=r"first derivatives only|functorch"):
        torch.func.grad(lambda x: relation_kl(x, y_s, x_t, y_t))(x_t)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_under_inference_mode(backend, reduction):
    x_s, y_s, x_t, y_t = inputs((2, 2, 6, 3, 5))
    kwargs = {"reduction": reduction, "backend": backend}
    expected = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, **kwargs)
    with torch.inference_mode():
        x_t, y_t = x_t.clone(), y_t.clone()
    assert all(torch.equal(a, b) for a, b in zip(loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, **kwargs), expected))


def test_repeat_runs_are_bitwise_equal():
    tensors = inputs((2, 12, 197, 16, 64))
    for a, b in zip(loss_and_grads(relation_kl, *tensors), loss_and_grads(relation_kl, *tensors)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype):
    tensors = inputs((2, 3, 50, 16, 64))
    for reduction in ("mean", "none"):
        plain = loss_and_grads(relation_kl, *tensors, reduction=reduction)
        with torch.autocast("cpu", dtype):
            cast = loss_and_grads(relation_kl, *tensors, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast))
    # The reference leaves its backward pass to autograd, which obeys autocast where it runs inside.
    plain = relation_kl(*tensors, backend="reference")
    with torch.autocast("cpu", dtype):
        assert torch.equal(relation_kl(*tensors, backend="reference"), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_are_as_cutting_the_images(backend, dtype, poisoned):
    """Tokens beyond the length are NaN: they must not be read into anything."""
    tensors = inputs((4, 3, 20, 8, 16), torch.float64)
    lengths = torch.tensor([20, 0, 1, 13], dtype=dtype)
    for z in tensors:
        for image, length in enumerate(lengths.tolist()):
            z[image, :, length:] = torch.nan
    rows, d_x, d_y = loss_and_grads(
        relation_kl, *tensors, lengths=lengths, reduction="none", upstream=1.0, backend=backend
    )
    for image, length in enumerate(lengths.tolist()):
        beyond = (z[image, :, length:] for z in (rows, d_x, d_y))
        assert all((z == 0).all() for z in beyond)
        if length:
            cut = [z[image : image + 1, :, :length] for z in tensors]
            exact = loss_and_grads(relation_kl, *cut, reduction="none", backend="reference")
            for a, b in zip((rows, d_x, d_y), exact):
                torch.testing.assert_close(a[image, :, :length], b[0], rtol=1e-12, atol=1e-14)

    total, d_x_total, _ = loss_and_grads(relation_kl, *tensors, lengths=lengths, reduction="sum", backend=backend)
    mean, d_x_mean, _ = loss_and_grads(relation_kl, *tensors, lengths=lengths, backend=backend)
    num_rows = 3 * (20 + 0 + 1 + 13)
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(mean, total / num_rows)
    torch.testing.assert_close(d_x_mean, d_x_total / num_rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_valid_token_at_all(backend):
    tensors = inputs((2, 3, 5, 4, 4))
    results = loss_and_grads(relation_kl, *tensors, lengths=torch.zeros(2, dtype=torch.long), backend=backend)
    assert all((z == 0).all() for z in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_of_1e4(backend, dtype):
    """One-hot rows that disagree, where a softmax followed by a logarithm gives infinity."""
    teacher = 100 * torch.eye(4, dtype=dtype).expand(1, 2, 4, 4)
    student = -teacher
    loss, d_x, d_y = loss_and_grads(
        relation_kl, student, -student, teacher, teacher, scale_s=1.0, scale_t=1.0, backend=backend
    )
    # The student's row is uniform over the three other tokens, 1e4 above the teacher's.
    assert loss.item() == pytest.approx(1e4 + torch.tensor(3.0).log().item(), rel=1e-6)
    assert d_x.isfinite().all() and d_y.isfinite().all()
    assert d_x.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend):
    """Logits that do not vary within a row are uniform relations, whatever their size."""
    _, _, x_t, y_t = inputs((1, 2, 10, 4, 4), torch.float64)
    x_s, y_s = 50 * torch.ones(1, 2, 10, 4).double(), 50 * torch.ones(1, 2, 10, 4).double()
    rows = relation_kl(x_s, y_s, x_t, y_t, reduction="none", backend=backend)
    log_t = torch.log_softmax((x_t @ y_t.mT) / 2, dim=-1)
    entropy = -(log_t.exp() * log_t).sum(-1)
    torch.testing.assert_close(rows, torch.tensor(10.0).double().log() - entropy, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_equal_to_student(backend, dtype):
    _, _, x, y = inputs((2, 3, 50, 16, 64), dtype)
    results = loss_and_grads(relation_kl, x, y, x, y, backend=backend)
    eps = torch.finfo(results[0].dtype).eps
    assert all(z.abs().max() <= 10 * eps for z in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(4), ids=["x_s", "y_s", "x_t", "y_t"])
def test_non_finite_input_shows_in_the_loss(backend, value, which):
    tensors = inputs((1, 2, 5, 4, 4))
    tensors[which][0, 1, 2, 3] = value
    assert not relation_kl(*tensors, backend=backend).isfinite()


@pytest.mark.parametrize("num_tokens", [197, 1100])  # several heads in a chunk; one map beyond CPU_MAP_BYTES
def test_three_maps_are_alive(num_tokens, loops):
    """No tensor holds more maps than the chunk's three, and there is one of that size; the compiled loops hold none."""
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(z.untyped_storage().nbytes() for z in outputs if isinstance(z, torch.Tensor))
            storages.update(
                (z.untyped_storage().data_ptr(), z.untyped_storage().nbytes())
                for z in outputs
                if isinstance(z, torch.Tensor) and z.untyped_storage().nbytes() >= map_bytes
            )
            return result

    map_bytes, storages = 4 * num_tokens**2, set()
    x_s, y_s, x_t, y_t = inputs((2, 24, num_tokens, 2, 2))
    d_x, d_y = torch.empty_like(x_s), torch.empty_like(y_s)
    with Allocations():
        chunked.relation_kl(x_s, y_s, x_t, y_t, scale_s=1.0, scale_t=1.0, d_x=d_x, d_y=d_y)
    large = [nbytes for _, nbytes in storages]
    if loops == "compiled":
        assert large == []
        return
    assert large == [max(sizes)]
    assert large[0] <= 3 * max(chunked.CPU_MAP_BYTES, map_bytes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([10, 0])], ids=["whole", "lengths"])
def test_registration(reduction, lengths):
    x_s, y_s, x_t, y_t = inputs((2, 3, 10, 8, 16))
    x_s.requires_grad_()
    op = torch.ops.tinymim_fast.relation_kl.default
    want_x = reduction == "mean"
    torch.library.opcheck(op, (x_s, y_s, x_t, y_t, lengths, 0.3, 0.2, reduction, "chunked", want_x, False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction):
    x_s, y_s, x_t, y_t = inputs((2, 3, 10, 8, 16))
    lengths = torch.tensor([10, 4])
    compiled = torch.compile(relation_kl, fullgraph=True, backend="aot_eager")
    kwargs = {"lengths": lengths, "reduction": reduction}
    eager = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, **kwargs)
    for a, b in zip(eager, loss_and_grads(compiled, x_s, y_s, x_t, y_t, **kwargs)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


GOOD = (2, 3, 5, 4, 8)
BAD = {
    "x_s: got list": {"x_s": [1.0]},
    "x_s: got shape": {"x_s": torch.zeros(3, 5, 4)},
    "y_s: got shape .* all at least 1": {"y_s": torch.zeros(2, 3, 0, 4)},
    "y_s: got dtype torch.int64": {"y_s": torch.zeros(2, 3, 5, 4, dtype=torch.long)},
    "y_s: got dtype torch.float16": {"y_s": torch.zeros(2, 3, 5, 4, dtype=torch.half)},
    "y_s: got D = 5": {"y_s": torch.zeros(2, 3, 5, 5)},
    "y_s: got strides": {"y_s": torch.zeros(2, 3, 4, 5).mT},
    "x_t: got .B, H, N. = .2, 1, 5.": {"x_t": torch.zeros(2, 1, 5, 8)},
    "x_t: got device meta": {"x_t": torch.zeros(2, 3, 5, 8, device="meta")},
    "y_t: got D = 4": {"y_t": torch.zeros(2, 3, 5, 4)},
    "x_t: got requires_grad=True.*no_grad": {"x_t": torch.zeros(2, 3, 5, 8, requires_grad=True)},
    "y_t: got requires_grad=True.*detach": {"y_t": torch.zeros(2, 3, 5, 8, requires_grad=True)},
    "reduction: got 'batchmean'": {"reduction": "batchmean"},
    "backend: got 'cuda'": {"backend": "cuda"},
    "scale_s: got nan": {"scale_s": float("nan")},
    "scale_t: got '1'": {"scale_t": "1"},
    "lengths: got list": {"lengths": [5, 5]},
    "lengths: got shape .3,., want .2,.": {"lengths": torch.tensor([5, 5, 5])},
    "lengths: got dtype torch.float32": {"lengths": torch.tensor([5.0, 5.0])},
    "lengths: got dtype torch.bool": {"lengths": torch.tensor([True, True])},
    "lengths: got device meta": {"lengths": torch.zeros(2, dtype=torch.long, device="meta")},
    "lengths: got values from 1 to 6, want 0 to 5": {"lengths": torch.tensor([1, 6])},
    "lengths: got values from -1 to 5": {"lengths": torch.tensor([-1, 5])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = dict(zip(("x_s", "y_s", "x_t", "y_t"), inputs(GOOD)))
    with pytest.raises(ValueError, match=f"^{message}"):
        relation_kl(**{**arguments, **BAD[message]})


ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shape", [(), (3, 1), (2, 5, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_the_upstream_gradient_is_multiplied_in_its_own_precision(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    gradient = (1e4 * torch.randn(2, 5, 3, 7, generator=generator)).to(device, dtype)
    factor = 1e-7 * (1 + torch.rand(shape, generator=generator, dtype=torch.float64))  # has two bits in fp16
    factor = factor.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    kept, expected = gradient.clone(), (gradient.to(factor.dtype) * factor).to(dtype)
    product = scaled(gradient, factor)
    assert product.dtype == dtype and torch.equal(product, expected)
    assert torch.equal(gradient, kept), "a second backward pass needs it"
