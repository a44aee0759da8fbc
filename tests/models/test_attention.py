"""Attention kernels against fp64, and which of them a model gets."""

import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models import attention
from tinymim_fast.models.attention import KERNELS, architecture, attend, use_attention
from tinymim_fast.models.taps import Place, Taps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # relative to the largest entry of the exact result


def exact_attention(q, k, v):
    """The formula in the dtype of its inputs, (B, N, H, D)."""
    maps = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", maps.softmax(-1), v)


def results(run, q, k, v, upstream):
    inputs = [z.detach().clone().requires_grad_() for z in (q, k, v)]
    out = run(*inputs)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(z.grad for z in inputs)]


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 3, 16), (1, 197, 3, 64), (2, 50, 1, 80)], ids=str)  # odd N; ViT; wide heads
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_and_gradients_are_those_of_sdpa(kernel, shape, dtype):
    """At most twice the error of SDPA in the same dtype."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(4))
    try:
        ours = results(lambda *z: attend(kernel, *z), q, k, v, upstream)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        if kernel in ("sdpa", "math") or (kernel == "flash" and DEVICE == CPU):
            raise
        pytest.skip(f"{kernel} can't run on {architecture(DEVICE)} with {dtype}: {str(error).splitlines()[0]}")
    exact = results(exact_attention, *(z.double() for z in (q, k, v, upstream)))
    sdpa = results(lambda *z: attend("sdpa", *z), q, k, v, upstream)
    for name, mine, theirs, want in zip(("out", "dq", "dk", "dv"), ours, sdpa, exact, strict=True):
        error, allowed = ((z.double() - want).abs().max() / want.abs().max() for z in (mine, theirs))
        assert error <= 2 * allowed + FLOORS[dtype], f"{name}: {error:.2e}, SDPA {allowed:.2e}"


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flash", "math"])
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}], ids=str)
def test_a_model_keeps_its_weights_names_and_outputs(kernel, kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0, **kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    names, wanted = list(model.state_dict()), model(images)
    ran = use_attention(model, kernel, CPU, torch.float32)
    assert ran == {"auto": "sdpa (flash, chosen by PyTorch) by auto", "sdpa": "sdpa (flash, chosen by PyTorch)"}.get(
        kernel, kernel
    )
    torch.testing.assert_close(model(images), wanted)
    assert list(model.state_dict()) == names
    taps = Taps(model, [Place("qkv", 1), Place("output", 2)])  # a tapped block goes on by the same kernel
    torch.testing.assert_close(model.norm(taps(images)[taps.places[1]])[:, 0], wanted)


def test_a_tapped_block_runs_the_chosen_kernel(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0)
    use_attention(model, "math", CPU, torch.float32)
    ran = []
    monkeypatch.setattr(attention, "attend", lambda kernel, *args: ran.append(kernel) or attend(kernel, *args))
    Taps(model, [Place("qkv", 1), Place("output", 2)])(torch.randn(1, 3, 32, 32))
    assert ran == ["math", "math"]


@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "xformers"])
def test_a_kernel_that_cant_run_is_one_line_with_what_can(kernel):
    if DEVICE != CPU:
        pytest.skip("there is a GPU, which can")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    with pytest.raises(InputError) as refused:
        use_attention(model, kernel, CPU, torch.bfloat16, gradients=True)
    message = str(refused.value)
    assert message.startswith(f"attention: got {kernel}, which can't run on cpu") and "\n" not in message
    assert "bfloat16 and heads of width 64" in message and message.endswith("want auto, sdpa, flash or math")


def test_auto_follows_the_table_and_falls_back_to_sdpa(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    monkeypatch.setattr(attention, "MEASURED", {("cpu_x", torch.bfloat16, True): "math"})
    monkeypatch.setattr(attention, "architecture", lambda device: "cpu_x")
    assert use_attention(model, "auto", CPU, torch.bfloat16, gradients=True) == "math by auto"
    assert use_attention(model, "auto", CPU, torch.bfloat16).startswith("sdpa")
    assert use_attention(model, "auto", CPU, torch.float32, gradients=True).startswith("sdpa")
    monkeypatch.setattr(attention, "architecture", lambda device: "sm_999")
    assert use_attention(model, "auto", CPU, torch.bfloat16, gradients=True).startswith("sdpa")


def test_xformers_gets_views_of_the_packed_projection(monkeypatch):
    """(B, N, H, D) as they lie in it: its door to (B, M, H, K), behind which nothing is transposed."""
    seen = []

    def memory_efficient_attention(q, k, v, p):
        seen.extend((q, k, v))
        return attend("sdpa", q, k, v, p)

    fake = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=memory_efficient_attention))
    monkeypatch.setitem(sys.modules, "xformers", fake)
    monkeypatch.setitem(sys.modules, "xformers.ops", fake.ops)
    qkv = torch.randn(2, 5, 3, 4, 8)
    torch.testing.assert_close(attend("xformers", *qkv.unbind(2)), attend("math", *qkv.unbind(2)))
    assert all(z.shape == (2, 5, 4, 8) and z._base is qkv for z in seen) and len(seen) == 3


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "math"])
def test_blocks_compile_without_a_graph_break(kernel):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    use_attention(model, kernel, CPU, torch.float32)
    x = torch.randn(1, 5, 192)
    block = model.blocks[0]
    compiled = torch.compile(block.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
