"""A CUDA graph can hold the loss and its gradient: no read by the host, no memory but PyTorch's allocator's."""

from functools import partial

import pytest
import torch

from support.operators import RefuseWhatNoGraphHolds
from support.relations import packed
from tinymim_fast.kernels import RelationLoss, relation_kl, replay, triton_backend
from tinymim_fast.kernels.operands import Launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_interpreter = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="needs TRITON_INTERPRET=1, which is for CPUs"
)


def of_packed(device, dtype, weights=None, num_tokens=20):
    """What a training step does with both projections."""
    qkv_s, qkv_t = (qkv.to(device) for qkv in packed((2, num_tokens, 2, 16, 32), dtype))
    loss_fn = RelationLoss(2, weights=weights, backend="triton")

    def step():
        return torch.autograd.grad(loss_fn(qkv_s, qkv_t)["loss"], qkv_s)

    return (qkv_s.requires_grad_(), qkv_t), step


def of_heads(device, reduction):
    x_s, y_s, x_t, y_t = (torch.randn(2, 2, 20, d, device=device) for d in (16, 16, 32, 32))

    def step():
        loss = relation_kl(x_s, y_s, x_t, y_t, reduction=reduction, backend="triton")
        return torch.autograd.grad(loss, (x_s, y_s), torch.ones_like(loss))

    return (x_s.requires_grad_(), y_s.requires_grad_(), x_t, y_t), step


CASES = {
    **{f"packed-{d}".replace("torch.", ""): partial(of_packed, dtype=d) for d in DTYPES},
    "weights": partial(of_packed, dtype=torch.float32, weights=[2.0, 0.5]),
    "tiled": partial(of_packed, dtype=torch.float32, num_tokens=300),
    **{reduction: partial(of_heads, reduction=reduction) for reduction in ("mean", "sum", "none")},
}


class NoKernel:
    """Stands for a compiled kernel, which is launched on other tensors as it was on the first."""

    def __getitem__(self, grid):
        return lambda *arguments: None


@needs_interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_host_asks_for_nothing_and_memory_is_pytorchs(monkeypatch, case):
    """In the first step, which plans, and in the second, which replays; without the kernels, which a host only starts.

    Of memory: the gradients, and a few numbers a row (relation "none": also the rows' weights).
    """
    monkeypatch.setattr(Launch, "run", lambda launch: NoKernel())
    monkeypatch.setattr(replay, "_replays", {})
    tensors, step = case("cpu")
    for _ in range(2):
        with RefuseWhatNoGraphHolds() as allocated:
            step()
        student = [z for z in tensors if z.requires_grad]
        num_rows = 2 * 2 * 2 * tensors[0].shape[1 if tensors[0].ndim == 3 else 2]  # of both relations
        gradients = sum(z.nbytes for z in student)
        assert gradients <= allocated.num_bytes <= 2 * gradients + 4 * 16 * num_rows + 4096, allocated.num_bytes


def test_what_no_graph_holds_is_refused():
    with RefuseWhatNoGraphHolds() as allocated:
        torch.empty(8).add(1)
    assert allocated.num_bytes == 64
    for read in (lambda z: z.sum().item(), lambda z: bool(z[0] == 1), lambda z: z[z > 0], lambda z: torch.tensor(1.0)):
        with pytest.raises(AssertionError, match="can't be captured"), RefuseWhatNoGraphHolds():
            read(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_captured_loss_is_the_eager_one_on_fresh_inputs(case):
    """Bitwise, three times; the graph's memory is poisoned in between."""
    tensors, step = case("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # plans, compiles, replays
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for z in tensors:
                z.copy_(torch.randn(z.shape, device="cuda", generator=generator))
        for z in captured:
            z.fill_(float("nan"))
        graph.replay()
        for ours, eager in zip(captured, step(), strict=True):
            assert torch.equal(ours, eager)
