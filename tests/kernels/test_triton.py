"""Backend "triton" against the formula in fp64: both kernels, in the interpreter or on a GPU.

Triton's interpreter computes bf16 products wrongly: bf16 runs on a GPU only.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.programs import given, settings, st
from support.relations import (
    assert_relation_kl_as_exact,
    assert_relation_loss_as_exact,
    inputs,
    loss_and_grad,
    loss_and_grads,
    packed,
)
from tinymim_fast.kernels import RelationLoss, backends, relation_kl, relation_loss, single_pass, tiles, triton_backend

GPU = torch.cuda.is_available()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
needs_interpreter = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="needs TRITON_INTERPRET=1, which is for CPUs"
)
PLACES = [
    *(pytest.param(("cpu", d), marks=needs_interpreter, id=f"cpu-{d}") for d in (torch.float32, torch.float16)),
    *(
        pytest.param(("cuda", d), marks=needs_gpu, id=f"cuda-{d}")
        for d in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
# single_pass with half rows and with whole rows in a warp: other orders of the keys, another way to dY at D_s 64.
KERNELS = ["single_pass", "whole_rows", "tiled"]

# (B, H, N, D_s, D_t)
SHAPES = [
    pytest.param((1, 12, 197, 16, 64), id="tiny-from-base"),
    pytest.param((1, 2, 197, 32, 64), id="small-from-base"),
    pytest.param((1, 1, 197, 64, 64), id="equal-head-widths"),
    pytest.param((1, 16, 50, 48, 64), id="base-from-large-three-quarters-of-a-tile"),
    pytest.param((1, 1, 196, 12, 64), id="no-class-token-narrower-than-a-tile"),
    pytest.param((3, 5, 50, 24, 80), id="huge-teacher-odd-batch-and-heads"),
    pytest.param((2, 3, 1, 16, 64), id="one-token-has-no-loss"),
    pytest.param((1, 2, 16, 16, 64), id="a-full-smallest-bucket"),
    pytest.param((1, 2, 17, 16, 64), id="one-token-beyond-it"),
    pytest.param((1, 1, 64, 8, 128), id="full-tiles-narrowest-and-widest-head"),
    pytest.param((1, 1, 65, 16, 64), id="one-token-beyond-full-tiles"),
    pytest.param((1, 1, 256, 16, 64), id="longest-single-pass"),
    pytest.param((1, 1, 17, 80, 48), id="huge-student-wider-than-its-teacher"),
    pytest.param((1, 1, 17, 128, 8), id="widest-and-narrowest-head"),
]
LONG_SHAPES = [
    pytest.param((1, 1, 257, 16, 64), id="shortest-that-must-be-tiled"),
    pytest.param((1, 1, 577, 16, 64), id="384-pixels"),
    pytest.param((1, 1, 1025, 16, 64), id="512-pixels"),
    pytest.param((1, 1, 4097, 16, 64), id="1024-pixels"),
]

WIDE_SHAPES = [
    pytest.param((1, 1, 70, 192, 768), id="wide-student-of-a-wider-teacher"),
    pytest.param((1, 2, 40, 16, 1024), id="narrow-student-of-the-widest-teacher"),
    pytest.param((1, 1, 40, 1000, 130), id="several-shares-of-the-gradient-the-last-ragged"),
    pytest.param((2, 1, 33, 129, 64), id="just-wide"),
]


def force(monkeypatch, kernel):
    """Whatever the shape, this kernel; tiles small enough that there are several."""

    def tile(operands):
        if kernel == "whole_rows" and triton_backend.INTERPRETED:
            return tiles.SinglePassTile(block_queries=64, num_warps=4, ahead=True, staggered=True)
        if kernel == "whole_rows":
            pytest.skip("on a GPU the shipped choices are tested, as single_pass")
        if kernel == "single_pass":
            problem = triton_backend.problem(operands)
            if not triton_backend.INTERPRETED and isinstance(tile := tiles.choose(problem), tiles.SinglePassTile):
                return tile
            if not triton_backend.INTERPRETED:
                pytest.skip(f"is tiled here: {problem}")
            return tiles.SinglePassTile(block_queries=64, num_warps=8, key_groups=2)
        return tiles.TiledTile(block_queries=64, block_keys=64, num_warps=4)

    monkeypatch.setattr(triton_backend, "choose_tile", tile)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    force(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture
def place_of_kernel(place, kernel):
    device, dtype = place
    if device == "cuda" and dtype == torch.float32 and kernel != "tiled":
        pytest.skip("fp32 maps of all keys do not fit on the chip: fp32 is always tiled")
    return place


def on(place, tensors):
    return [z.to(*place) for z in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, place_of_kernel, assert_as_exact, poisoned):
    tensors = on(place_of_kernel, inputs(shape))
    assert_relation_kl_as_exact(assert_as_exact, tensors, place_of_kernel[1], "triton", upstream=3.0)


@pytest.mark.parametrize("shape", LONG_SHAPES)
def test_long_shapes(shape, place, monkeypatch, assert_as_exact, poisoned):
    if place[0] == "cpu":  # the interpreter's time is the number of tiles
        tile = tiles.TiledTile(block_queries=128, block_keys=128, num_warps=4)
        monkeypatch.setattr(triton_backend, "choose_tile", lambda operands: tile)
    assert_relation_kl_as_exact(assert_as_exact, on(place, inputs(shape)), place[1], "triton")


@pytest.mark.parametrize("shape", WIDE_SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wide_heads(shape, reduction, place, assert_as_exact, poisoned):
    tensors = on(place, inputs(shape))
    for z in tensors:
        z *= (16 / z.shape[3]) ** 0.25  # logits of order one, not of the square root of the width
    assert_relation_kl_as_exact(assert_as_exact, tensors, place[1], "triton", reduction=reduction)


def test_wide_heads_packed_with_lengths(place, assert_as_exact, poisoned):
    """As LightlyTrain's relation: one head, softmax(F F^T / 0.07) of normalised features, padding in one image."""
    features = [torch.nn.functional.normalize(z, dim=-1) for z in inputs((2, 1, 70, 200, 384))]
    x_s, _, x_t, _ = on(place, features)
    lengths = torch.tensor([70, 33], device=place[0])

    def run(x_s, x_t, backend):
        x_s = x_s.detach().requires_grad_()
        scales = {"scale_s": 1 / 0.07, "scale_t": 1 / 0.07}
        loss = relation_kl(x_s, x_s, x_t, x_t, lengths=lengths, backend=backend, **scales)
        loss.backward()
        return loss.detach(), x_s.grad

    runs = run(x_s, x_t, "triton"), run(x_s, x_t, "reference"), run(x_s.double(), x_t.double(), "reference")
    for name, dtype, *results in zip(("loss", "grad"), (torch.float32, place[1]), *runs):
        assert_as_exact(name, *results, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_have_their_own_upstream_gradients(reduction, place_of_kernel, assert_as_exact, poisoned):
    # From what fp16 loss scaling sends back to what would underflow in fp16.
    upstream = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream *= torch.logspace(-6, 3, 6).view(2, 3, 1)
    upstream = upstream.to(place_of_kernel[0]) if reduction == "none" else 1000.0
    tensors = on(place_of_kernel, inputs((2, 3, 50, 16, 64)))
    assert_relation_kl_as_exact(assert_as_exact, tensors, place_of_kernel[1], "triton", upstream, reduction)


@pytest.mark.parametrize(
    "relations",
    [("qk", "vv"), ("vv", "qk"), ("qq", "kk", "vv"), ("qk", "qq"), ("vv",), ("qk", "vv", "qq", "kk")],
    ids="+".join,
)
def test_packed_relations(relations, place_of_kernel, assert_as_exact, poisoned):
    qkv_s, qkv_t = on(place_of_kernel, packed((3, 20, 5, 12, 16)))
    assert_relation_loss_as_exact(assert_as_exact, qkv_s, qkv_t, 5, relations, "triton", upstream=4096.0)


def test_qk_and_vv_are_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_backend.Launch, "run", lambda launch: launches.append(launch))
    qkv_s, qkv_t = packed((2, 20, 3, 16, 16), torch.float16)
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    relation_loss(qkv_s.requires_grad_(), qkv_t, relation_heads=3, backend="triton")
    # The second, for rows that need their maximum, returns at once where there are none.
    assert [launch.arguments["EXACT"] for launch in launches] == [False, True]
    assert {launch.grid for launch in launches} == {(2 * 3 * 2,)}


def test_mixed_dtypes(kernel, place, assert_as_exact):
    device, dtype = place
    if device == "cuda" and kernel != "tiled":
        pytest.skip("fp32 maps of all keys do not fit on the chip: fp32 is always tiled")
    x_s, y_s, x_t, y_t = inputs((2, 3, 50, 16, 64))
    tensors = [*on(place, (x_s, y_s)), x_t.to(device), y_t.to(device)]
    ours = loss_and_grads(relation_kl, *tensors, backend="triton")
    exact = loss_and_grads(relation_kl, *(z.double() for z in tensors), backend="reference")
    pytorch = loss_and_grads(relation_kl, *tensors, backend="reference")
    for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, pytorch, exact):
        assert_as_exact(name, *results, dtype if name != "loss" else torch.float32)


def test_strides(place_of_kernel, assert_as_exact):
    """Slices of packed projections, transposed and expanded tensors, read in place."""
    qkv_s, qkv_t = (torch.randn(2, 20, 3, 4, d, generator=torch.Generator().manual_seed(d)) for d in (16, 64))
    sliced = [qkv.to(*place_of_kernel)[:, :, i].transpose(1, 2) for qkv in (qkv_s, qkv_t) for i in (0, 1)]
    transposed = [z.contiguous().transpose(0, 1) for z in sliced]
    expanded = [z[:1, :1].expand(3, 2, -1, -1) for z in sliced]
    for tensors in (sliced, transposed, expanded):
        assert_relation_kl_as_exact(assert_as_exact, tensors, place_of_kernel[1], "triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_x_and_y_of_other_strides_are_copied(reduction, place_of_kernel, assert_as_exact, poisoned):
    """The kernels have one set of strides a side; gradients come out right in either's layout."""
    x_s, y_s, x_t, y_t = on(place_of_kernel, inputs((2, 3, 17, 8, 16)))
    tokens_first = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in (y_s, x_t)]
    assert_relation_kl_as_exact(
        assert_as_exact, [x_s, tokens_first[0], tokens_first[1], y_t], place_of_kernel[1], "triton", reduction=reduction
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_requires_grad_subsets(reduction, place_of_kernel, poisoned):
    x_s, y_s, x_t, y_t = on(place_of_kernel, inputs((2, 3, 17, 8, 8)))
    kwargs = {"reduction": reduction, "backend": "triton"}
    both = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, **kwargs)
    for want_x, want_y in ((True, False), (False, True), (False, False)):
        x, y = x_s.clone().requires_grad_(want_x), y_s.clone().requires_grad_(want_y)
        loss = relation_kl(x, y, x_t, y_t, **kwargs)
        assert torch.equal(loss.detach(), both[0])
        if want_x or want_y:
            loss.sum().backward()
        assert torch.equal(x.grad, both[1]) if want_x else x.grad is None
        assert torch.equal(y.grad, both[2]) if want_y else y.grad is None


def test_backward_twice(place_of_kernel):
    x_s, y_s, x_t, y_t = on(place_of_kernel, inputs((2, 3, 17, 8, 8)))
    for reduction in ("mean", "none"):
        loss = relation_kl(x_s.requires_grad_(), y_s, x_t, y_t, reduction=reduction, backend="triton").sum()
        (first,), (second,) = (torch.autograd.grad(loss, x_s, retain_graph=True) for _ in range(2))
        assert torch.equal(first, second)


def test_repeat_runs_are_bitwise_equal(place_of_kernel):
    tensors = on(place_of_kernel, inputs((2, 3, 65, 16, 64)))
    first, second = (loss_and_grads(relation_kl, *tensors, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_lengths(dtype, place_of_kernel, assert_as_exact, poisoned):
    """As cutting the images; NaN beyond the length is not read, and the gradient there is 0."""
    tensors = on(place_of_kernel, inputs((4, 2, 40, 8, 16)))
    lengths = torch.tensor([40, 0, 1, 33], dtype=dtype, device=place_of_kernel[0])
    zeroed = [z.clone() for z in tensors]
    for image, length in enumerate(lengths.tolist()):
        for z, clean in zip(tensors, zeroed):
            z[image, :, length:] = torch.nan
            clean[image, :, length:] = 0
    for reduction in ("mean", "none"):
        kwargs = {"lengths": lengths, "reduction": reduction}
        ours = loss_and_grads(relation_kl, *tensors, backend="triton", **kwargs)
        pytorch = loss_and_grads(relation_kl, *zeroed, backend="reference", **kwargs)
        exact = loss_and_grads(relation_kl, *(z.double() for z in zeroed), backend="reference", **kwargs)
        for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, pytorch, exact):
            assert_as_exact(name, *results, place_of_kernel[1] if name != "loss" else torch.float32)
        for z in ours[1:]:
            assert (z[1] == 0).all() and (z[2, :, 1:] == 0).all() and (z[3, :, 33:] == 0).all()


def test_packed_lengths(place_of_kernel, assert_as_exact, poisoned):
    qkv_s, qkv_t = on(place_of_kernel, packed((3, 20, 2, 8, 16)))
    lengths = torch.tensor([20, 0, 7], device=place_of_kernel[0])
    qkv_s[2, 7:] = qkv_t[2, 7:] = torch.nan

    def run(qkv_s, qkv_t, backend):
        qkv_s = qkv_s.detach().nan_to_num().requires_grad_() if backend == "reference" else qkv_s.requires_grad_()
        loss = relation_loss(qkv_s, qkv_t, relation_heads=2, lengths=lengths, backend=backend)["loss"]
        loss.backward()
        return loss.detach(), qkv_s.grad

    ours = run(qkv_s.clone(), qkv_t, "triton")
    pytorch = run(qkv_s, qkv_t.nan_to_num(), "reference")
    exact = run(qkv_s.double(), qkv_t.double().nan_to_num(), "reference")
    for name, dtype, *results in zip(("loss", "grad"), (torch.float32, place_of_kernel[1]), ours, pytorch, exact):
        assert_as_exact(name, *results, dtype)


def test_no_valid_token_at_all(place_of_kernel):
    tensors = on(place_of_kernel, inputs((2, 3, 17, 4, 4)))
    lengths = torch.zeros(2, dtype=torch.long, device=place_of_kernel[0])
    results = loss_and_grads(relation_kl, *tensors, lengths=lengths, backend="triton")
    assert all((z == 0).all() for z in results)


@pytest.mark.parametrize("num_tokens", [4, 50])  # rows with their maxima at once, and after the flag
def test_logits_of_1e4(num_tokens, place_of_kernel):
    """One-hot rows that disagree, where a softmax followed by a logarithm gives infinity."""
    device, dtype = place_of_kernel
    teacher = 100 * torch.eye(num_tokens, dtype=dtype, device=device).expand(1, 2, -1, -1)
    loss, d_x, d_y = loss_and_grads(
        relation_kl, -teacher, teacher, teacher, teacher, scale_s=1.0, scale_t=1.0, backend="triton"
    )
    # The student's row is uniform over the other tokens, 1e4 above the teacher's.
    assert loss.item() == pytest.approx(1e4 + torch.tensor(num_tokens - 1.0).log().item(), rel=1e-6)
    assert d_x.isfinite().all() and d_y.isfinite().all()
    assert d_x.abs().max() > 0


def test_rows_that_need_their_maximum(place_of_kernel, assert_as_exact):
    """One head's logits far beyond 2^60, beside tame heads."""
    tensors = inputs((1, 3, 33, 16, 64))
    for z in tensors:
        z[:, 1] *= 6
    assert_relation_kl_as_exact(
        assert_as_exact, on(place_of_kernel, tensors), place_of_kernel[1], "triton", reduction="none"
    )


def test_near_the_overflow_of_fp16(place_of_kernel, assert_as_exact):
    """Logits and products far beyond 65504, where fp16 PyTorch has NaN: as PyTorch in fp32."""
    tensors = inputs((1, 3, 33, 16, 64))
    tensors[0][0, 1, 0, 0] = tensors[2][0, 1, 5, 3] = 6e4
    tensors = on(place_of_kernel, tensors)
    ours = loss_and_grads(relation_kl, *tensors, backend="triton")
    pytorch = loss_and_grads(relation_kl, *tensors, backend="reference")
    exact = loss_and_grads(relation_kl, *(z.double() for z in tensors), backend="reference")
    for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, pytorch, exact):
        assert_as_exact(name, *results, place_of_kernel[1] if name != "loss" else torch.float32)


def test_flags_mark_rows_that_need_their_maximum(monkeypatch):
    force(monkeypatch, "single_pass")
    x_s, y_s, x_t, y_t = inputs((1, 3, 33, 16, 64))
    x_t[:, 1] *= 40
    operands = triton_backend.Operands(
        x_s=x_s, y_s=y_s, x_t=x_t, y_t=y_t, d_x=None, d_y=None, scale_s=0.25, scale_t=0.125
    )
    if not triton_backend.INTERPRETED:
        pytest.skip("reads the flags of a launch on the CPU")
    _, launches = triton_backend.plan(operands, triton_backend.choose_tile(operands))
    launches[0].run()
    assert launches[0].arguments["flags_ptr"].tolist() == [0, 1, 0]


def test_many_flags_a_program(monkeypatch, place_of_kernel, assert_as_exact, poisoned):
    """Programs of the second launch that have several maps to compute, one, and none."""
    monkeypatch.setattr(single_pass, "MANY_PROGRAMS", 1)
    tensors = inputs((2, 8, 33, 16, 64))
    for z in tensors:
        z[0, :3] *= 6
        z[1, 1] *= 6
    assert_relation_kl_as_exact(
        assert_as_exact, on(place_of_kernel, tensors), place_of_kernel[1], "triton", reduction="none"
    )


def test_constant_rows(place_of_kernel):
    """Logits that do not vary within a row are uniform relations, whatever their size."""
    _, _, x_t, y_t = on(place_of_kernel, inputs((1, 2, 20, 4, 4)))
    x_s = torch.full_like(x_t, 50)
    rows = relation_kl(x_s, x_s, x_t, y_t, reduction="none", backend="triton")
    log_t = torch.log_softmax((x_t.double() @ y_t.double().mT) / 2, dim=-1)
    expected = torch.tensor(20.0).log().double() + (log_t.exp() * log_t).sum(-1)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)


def test_teacher_equal_to_student(place_of_kernel):
    _, _, x, y = on(place_of_kernel, inputs((2, 3, 50, 16, 64)))
    results = loss_and_grads(relation_kl, x, y, x, y, backend="triton")
    assert all((z == 0).all() for z in results)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(4), ids=["x_s", "y_s", "x_t", "y_t"])
def test_non_finite_input_shows_in_the_loss(value, which, place_of_kernel):
    tensors = on(place_of_kernel, inputs((1, 2, 18, 4, 4)))
    tensors[which][0, 1, 2, 3] = value
    assert not relation_kl(*tensors, backend="triton").isfinite()


@needs_interpreter
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    kernel=st.sampled_from(KERNELS),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16])] * 2),
    lengths=st.booleans(),
    scales=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_problem_is_the_reference(shape, kernel, dtypes, lengths, scales, reduction, seed):
    x_s, y_s, x_t, y_t = inputs(shape, seed=seed)
    tensors = [x_s.to(dtypes[0]), y_s.to(dtypes[0]), x_t.to(dtypes[1]), y_t.to(dtypes[1])]
    generator = torch.Generator().manual_seed(seed)
    kwargs = {
        "lengths": torch.randint(0, shape[2] + 1, shape[:1], generator=generator) if lengths else None,
        "upstream": torch.randn(shape[:3] if reduction == "none" else (), generator=generator),
        "reduction": reduction,
        "scale_s": scales[0],
        "scale_t": scales[1],
    }
    with pytest.MonkeyPatch.context() as patch:
        force(patch, kernel)
        ours = loss_and_grads(relation_kl, *tensors, backend="triton", **kwargs)
    exact = loss_and_grads(relation_kl, *tensors, backend="reference", **kwargs)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 if dtypes[0] == torch.float32 else 4e-3
    for a, b in zip(ours[1:], exact[1:]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def test_no_map_in_memory(kernel):
    """Beside the gradients, a plan allocates a few numbers per row."""
    num_images, num_heads, num_tokens = 2, 3, 250
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(z.numel() for z in (result if isinstance(result, (tuple, list)) else [result]))
            return result

    x_s, y_s, x_t, y_t = inputs((num_images, num_heads, num_tokens, 2, 2), torch.float16)
    weights = torch.ones(num_images, num_heads, num_tokens)
    operands = triton_backend.Operands(
        x_s=x_s, y_s=y_s, x_t=x_t, y_t=y_t, d_x=x_s, d_y=y_s, weights=weights, scale_s=1.0, scale_t=1.0
    )
    with Allocations():
        triton_backend.plan(operands, triton_backend.choose_tile(operands))
    assert sizes and max(sizes) <= 4 * num_images * num_heads * num_tokens


@needs_interpreter
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([10, 0])], ids=["whole", "lengths"])
def test_registration(reduction, lengths):
    x_s, y_s, x_t, y_t = inputs((2, 1, 10, 8, 16))
    x_s.requires_grad_()
    op = torch.ops.tinymim_fast.relation_kl.default
    want_x = reduction == "mean"
    torch.library.opcheck(op, (x_s, y_s, x_t, y_t, lengths, 0.3, 0.2, reduction, "triton", want_x, False))


@needs_interpreter
def test_registration_of_packed_relations():
    qkv_s, qkv_t = packed((2, 10, 2, 4, 8))
    op = torch.ops.tinymim_fast.relation_loss.default
    arguments = qkv_s.requires_grad_(), qkv_t, torch.tensor([10, 4]), 2, "qk,vv", "triton", True
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(place, dynamic):
    module = RelationLoss(3, backend="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 10, 3, 4, 8), (3, 12, 3, 4, 8)):
        results = []
        for function in (module, compiled):
            qkv_s, qkv_t = on(place, packed(shape))
            loss = function(qkv_s.requires_grad_(), qkv_t)["loss"]
            loss.backward()
            results.append((loss.detach(), qkv_s.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing(cast, reduction, place, assert_as_exact):
    """A half-precision student of an fp32 teacher and the reverse, forward and backward inside autocast."""
    device, dtype = place
    tensors = [z.to(device) for z in inputs((1, 2, 17, 8, 16))]
    for low in (slice(0, 2), slice(2, 4)):
        mixed = list(tensors)
        mixed[low] = [z.to(dtype) for z in mixed[low]]
        plain = loss_and_grads(relation_kl, *mixed, reduction=reduction, backend="triton")
        with torch.autocast(device, cast):
            ours = loss_and_grads(relation_kl, *mixed, reduction=reduction, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))
        exact = loss_and_grads(relation_kl, *(z.double() for z in mixed), reduction=reduction, backend="reference")
        pytorch = loss_and_grads(relation_kl, *mixed, reduction=reduction, backend="reference")
        for name, *results in zip(("loss", "d_x_s", "d_y_s"), ours, pytorch, exact):
            assert_as_exact(name, *results, mixed[0].dtype if name != "loss" else torch.float32)


def test_packed_relations_inside_autocast(place, assert_as_exact):
    """The projections come out of autocast in its dtype; the teacher ran without."""
    device = place[0]
    cast = torch.float16 if device == "cpu" else torch.bfloat16  # the interpreter's bf16 products are wrong
    weight, _ = packed((1, 36, 1, 2, 2), seed=1)
    tokens, qkv_t = (z.to(device) for z in packed((2, 10, 1, 2, 24)))
    qkv_t = qkv_t.to(place[1])
    with torch.autocast(device, cast):
        qkv_s = torch.nn.functional.linear(tokens, weight[0].to(device))
        assert qkv_s.dtype == cast
        ours, grad = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=3, backend="triton")
    kwargs = {"relation_heads": 3, "backend": "reference"}
    pytorch = loss_and_grad(relation_loss, qkv_s, qkv_t, **kwargs)
    exact = loss_and_grad(relation_loss, qkv_s.double(), qkv_t.double(), **kwargs)
    assert_as_exact("loss", ours, pytorch[0], exact[0], torch.float32)
    assert_as_exact("d_qkv_s", grad, pytorch[1], exact[1], cast)


def test_why_it_cannot_run(monkeypatch):
    tensors = inputs((1, 2, 5, 4, 4))
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"^backend: got 'triton', on cpu; it runs on CUDA and ROCm .*TRITON_INTERPRET"
    ):
        relation_kl(*tensors, backend="triton")
    with pytest.raises(ValueError, match=r"^backend: got 'triton', on cpu"):
        RelationLoss(1, backend="triton")(*packed((1, 5, 1, 4, 4)))
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"^backend: got 'triton', on torch.float64; it takes fp32, fp16 and bf16"):
        relation_kl(*(z.double() for z in tensors), backend="triton")
    with pytest.raises(ValueError, match=r"^backend: got 'triton', on heads of width 1025; it takes at most 1024"):
        relation_kl(*inputs((1, 1, 5, 1025, 4)), backend="triton")
    monkeypatch.setattr(triton_backend, "TRITON_VERSION", (3, 4))
    with pytest.raises(ValueError, match=r"^backend: got 'triton', but triton is 3.4; it needs at least 3.5"):
        relation_kl(*tensors, backend="triton")
    monkeypatch.setattr(triton_backend, "TRITON_VERSION", None)
    with pytest.raises(ValueError, match=r"^backend: got 'triton', but triton is not installed"):
        relation_kl(*tensors, backend="triton")


def test_auto_on_the_cpu_is_chunked():
    tensors = inputs((1, 2, 50, 4, 4))
    auto, chunked = (relation_kl(*tensors, backend=backend) for backend in ("auto", "chunked"))
    assert torch.equal(auto, chunked)


def test_every_problem_has_a_tile():
    for arch in (None, "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        for bucket in (16, 32, 64, 128, 256, 512, 8192):
            for itemsize in (2, 4):
                problem = tiles.Problem(arch=arch, bucket=bucket, head_dim_s=64, head_dim_t=128, itemsize=itemsize)
                tile = tiles.choose(problem)
                assert isinstance(tile, tiles.TiledTile) or bucket <= 256
                for candidate in (tile, *tiles.candidates(problem)):
                    assert isinstance(candidate, tiles.TiledTile) or bucket % (8 * candidate.key_groups) == 0


def test_strides_beyond_32_bits_are_tiled():
    """The single pass adds 32-bit offsets within a head; on "meta", as nothing so large fits here."""
    x = torch.empty_strided((1, 1, 200, 16), (0, 0, 2**24, 1), dtype=torch.float16, device="meta")
    operands = triton_backend.Operands(x_s=x, y_s=x, x_t=x, y_t=x, d_x=None, d_y=None, scale_s=1.0, scale_t=1.0)
    assert isinstance(triton_backend.choose_tile(operands), tiles.TiledTile)


@needs_interpreter
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "heads", "tokens"])
def test_offsets_beyond_32_bits(axis, monkeypatch):
    """A stride of 2^30 over three entries, in memory of which only those entries are ever touched."""
    shape, strides = [1, 1, 3, 16], [48, 48, 16, 1]
    shape[axis], strides[axis] = 3, 2**30
    room = torch.empty(2**31 + 2**20, dtype=torch.float16)
    far = [room.as_strided(shape, strides, offset) for offset in (0, 64)]  # else x and y are copied
    near = inputs((*shape, 16), torch.float16)
    for there, here in zip(far, near[2:]):
        there.copy_(here)
    # Tokens so far apart are the tiled kernels' by choice; images and heads are single_pass's as well.
    for kernel in KERNELS if axis < 2 else ["tiled"]:
        force(monkeypatch, kernel)
        ours = loss_and_grads(relation_kl, *near[:2], *far, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(ours, loss_and_grads(relation_kl, *near, backend="triton")))


def test_rocm_is_dispatched_to_triton_without_ptx(monkeypatch):
    """On a machine without it: what the plan asks of ROCm, from a device that only names itself."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    triton_backend._arch.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.empty(2, 3, 197, 16, dtype=torch.bfloat16, device="cuda")
            assert backends.resolve("auto", x.device, (x.dtype, x.dtype), (16, 16)) == "triton"
            operands = triton_backend.Operands(x_s=x, y_s=x, x_t=x, y_t=x, d_x=x, d_y=x, scale_s=1.0, scale_t=1.0)
            assert triton_backend.problem(operands).arch == "gfx942"
            _, launches = triton_backend.plan(operands, triton_backend.choose_tile(operands))
        assert not any(launch.arguments["PTX"] for launch in launches)
        assert {launch.arguments["PRECISION_S"] for launch in launches} == {"ieee"}
    finally:
        triton_backend._arch.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("num_tokens", [197, 1025])
    def test_peak_memory(self, num_tokens):
        b, h, d_s, d_t = 8, 12, 16, 64
        qkv_s, qkv_t = (z.to("cuda", torch.bfloat16) for z in packed((b, num_tokens, h, d_s, d_t)))
        qkv_s.requires_grad_()
        relation_loss(qkv_s, qkv_t, relation_heads=h)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        relation_loss(qkv_s, qkv_t, relation_heads=h)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= qkv_s.nbytes + 2 * b * h * 2 * num_tokens * 8 * 4

    def test_graph_capture(self):
        qkv_s, qkv_t = (z.to("cuda", torch.bfloat16) for z in packed((4, 197, 3, 16, 64)))
        module = RelationLoss(3)
        qkv_s.requires_grad_()

        def step():
            qkv_s.grad = None
            loss = module(qkv_s, qkv_t)["loss"]
            loss.backward()
            return loss, qkv_s.grad

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            eager = [z.clone() for z in step()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured))

    def test_beyond_32_bit_offsets(self):
        """The last image of a teacher with more than 2^31 elements; the student is one image, expanded."""
        n, h, d = 577, 16, 64
        qkv_s, qkv_t = (z.to("cuda", torch.bfloat16).unflatten(2, (3, h, d)) for z in packed((1, n, h, d, d)))
        many = torch.zeros(2**31 // qkv_t.numel() + 2, *qkv_t.shape[1:], dtype=torch.bfloat16, device="cuda")
        many[-1] = qkv_t[0]
        assert many[:-1].numel() > 2**31

        def rows(qkv_s, qkv_t):
            tensors = [qkv[:, :, i].transpose(1, 2) for qkv in (qkv_s, qkv_t) for i in (0, 1)]
            return relation_kl(*tensors, reduction="none", backend="triton")

        assert torch.equal(rows(qkv_s.expand(len(many), -1, -1, -1, -1), many)[-1], rows(qkv_s, qkv_t)[0])
