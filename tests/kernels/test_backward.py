"""What fused backends do with the upstream gradient, and launches that are replayed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.relations import loss_and_grad, packed
from tinymim_fast.kernels import RelationLoss, relation_loss, replay, triton_backend
from tinymim_fast.kernels.operands import Launch

needs_interpreter = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="needs TRITON_INTERPRET=1, which is for CPUs"
)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [3, 1024, 1500])  # less than a block, a block, more
@pytest.mark.parametrize("count", [1, 7, torch.tensor([7])], ids=["one", "number", "tensor"])
def test_rescale_is_the_product(dtype, width, count):
    gradient = torch.randn(2, 5, 3 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = torch.tensor([0.5, 3.0])
    relations = (1, 1, 0)
    factors = (upstream[list(relations)] / count).repeat_interleave(width)
    expected = (gradient.float() * factors).to(dtype)
    triton_backend.rescale(gradient, upstream, relations, count, width)
    torch.testing.assert_close(gradient, expected, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)


@needs_interpreter
def test_a_factor_of_one_touches_nothing():
    """Also of an expanded upstream gradient, which is what a sum's backward pass gives."""
    gradient = torch.tensor([[float("nan"), 1e-40, -0.0] * 3])
    bits = gradient.view(torch.int32).clone()
    version = gradient._version
    triton_backend.rescale(gradient, torch.ones(()).expand(2), (0, 0, 1), 1, 3)
    assert torch.equal(gradient.view(torch.int32), bits) and gradient._version == version


BACKENDS = [pytest.param("triton", marks=needs_interpreter), "chunked"]


class LargeResults(TorchDispatchMode):
    """Names of the operators that write a tensor of so many numbers or more."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size and not function.is_view:
            self.names.append(str(function))
        return result


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_mean_on_the_cpu_is_not_multiplied_again(weight):
    """The forward pass wrote its gradient; a factor that is not 1 is applied in place."""
    qkv_s, qkv_t = packed((2, 12, 2, 8, 16))
    qkv_s.requires_grad_()
    loss = weight * relation_loss(qkv_s, qkv_t, relation_heads=2, backend="chunked")["loss"]
    with LargeResults(qkv_s.numel()) as large:
        (gradient,) = torch.autograd.grad(loss, qkv_s)
    assert large.names == ([] if weight == 1 else ["aten.mul_.Tensor"])
    _, kept = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=2, backend="reference")
    torch.testing.assert_close(gradient, weight * kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5])], ids=["whole", "lengths"])
@pytest.mark.parametrize("relations", [("qk", "vv"), ("vv",), ("qk", "qq")], ids="+".join)
def test_a_kept_graph_has_the_same_gradient_again(dtype, lengths, relations, backend):
    """The pass that may, works in place; those before it, of a kept graph, leave what the forward pass wrote."""
    qkv_s, qkv_t = packed((2, 12, 2, 8, 16), dtype)
    qkv_s.requires_grad_()
    loss_fn = RelationLoss(2, relations=relations, backend=backend)
    loss = loss_fn(qkv_s, qkv_t, lengths=lengths)["loss"]

    def gradient(upstream, retain_graph):
        return torch.autograd.grad(loss, qkv_s, torch.tensor(upstream), retain_graph=retain_graph)[0]

    first, tripled, last = gradient(64.0, True), gradient(192.0, True), gradient(64.0, False)
    eps = torch.finfo(dtype).eps  # qk and qq share a projection, their gradients are added: of the largest entry
    tolerance = {"rtol": 2 * eps, "atol": 4 * eps * tripled.abs().max().item()}
    torch.testing.assert_close(tripled, 3 * first, **tolerance)
    torch.testing.assert_close(last, first, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_relations_reach_their_projections(backend):
    qkv_s, qkv_t = packed((2, 12, 2, 8, 16))
    by_relation = {"qk": 2.0, "vv": 0.5}
    _, weighted = loss_and_grad(RelationLoss(2, weights=by_relation, backend=backend), qkv_s, qkv_t)
    _, plain = loss_and_grad(relation_loss, qkv_s, qkv_t, relation_heads=2, backend=backend)
    factors = torch.tensor([2.0, 2.0, 0.5]).repeat_interleave(16)
    torch.testing.assert_close(weighted, plain * factors, rtol=1e-6, atol=1e-9)


class Compiled:
    """Stands for a compiled kernel: keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("num_tokens", [20, 300])  # the single pass, the tiled kernels
def test_a_replay_launches_what_a_plan_would(monkeypatch, num_tokens, with_lengths):
    """On other tensors of the same geometry; every argument by position, tensors by their memory."""
    planned, compiled = [], []

    def run(launch):
        planned.append(launch)
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(replay, "_replays", {})
    lengths = torch.tensor([7, 20]) if with_lengths else None

    def call(seed):
        qkv_s, qkv_t = packed((2, num_tokens, 2, 16, 16), torch.float16, seed)
        d_qkv = torch.empty_like(qkv_s)
        relations = ("qk", "vv")
        triton_backend.packed_relation_kl(qkv_s, qkv_t, 2, relations, lengths=lengths, d_qkv=d_qkv)
        return {"s": qkv_s, "t": qkv_t, "d": d_qkv}

    call(0)
    num_launches = len(planned)
    tensors = call(1)
    assert len(planned) == num_launches, "the second call planned again"
    for launch, kernel in zip(planned, compiled):
        ((grid, arguments),) = kernel.launches
        assert grid == (*launch.grid, 1, 1)[:3]
        for (name, value), got in zip(launch.arguments.items(), arguments, strict=True):
            if not isinstance(value, torch.Tensor):
                assert got == value or got is value
            elif name.startswith(("x_", "y_", "d_")):
                side = "d" if name.startswith("d_") else name[2]
                assert got.data_ptr() == tensors[side].data_ptr()
            else:
                assert got.shape == value.shape and got.dtype == value.dtype


def test_tensors_off_the_alignment_are_planned_anew(monkeypatch):
    """Triton compiles other code for them, so a replay would run the wrong kernel."""
    planned = []
    monkeypatch.setattr(Launch, "run", lambda launch: planned.append(launch) or Compiled())
    monkeypatch.setattr(replay, "_replays", {})
    room = torch.zeros(2 * 20 * 96 + 1, dtype=torch.float16)
    for offset, expected in ((0, 2), (1, 4), (0, 4)):
        qkv = room[offset : offset + 2 * 20 * 96].view(2, 20, 96)
        triton_backend.packed_relation_kl(qkv, qkv, 2, ("qk", "vv"))
        assert len(planned) == expected
