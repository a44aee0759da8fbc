"""Taps against timm's own forward, seen through hooks on the whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinymim_fast.errors import InputError
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import create_vit

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
EVERYWHERE = [
    *(Place(at, block) for block in (1, 3, 4) for at in ("input", "norm1", "qkv", "attention", "mlp", "output")),
    *(Place(at, block, after_residual=True) for block in (1, 3, 4) for at in ("attention", "mlp")),
    Place("final_norm"),
    Place("class_token"),
]


def build(*, img_size=32, **kwargs):
    """A model whose norms, LayerScale and biases are not the identity."""
    torch.manual_seed(0)
    model = create_vit("vit_tiny_patch16_224", img_size=img_size, **{**SMALL, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def by_hooks(model, images):
    """Every place's tensor, read off timm's modules while the whole model runs."""
    caught = {}
    handles = []

    def keep(module, name, which):
        def hook(module, inputs, output):
            caught[name] = inputs[0] if which == "input" else output

        handles.append(module.register_forward_hook(hook))

    for n, block in enumerate(model.blocks, 1):
        keep(block, ("input", n), "input")
        keep(block.norm1, ("norm1", n), "output")
        keep(block.attn.qkv, ("qkv", n), "output")
        keep(block.ls1, ("attention", n), "output")
        keep(block.norm2, ("attention after", n), "input")
        keep(block.ls2, ("mlp", n), "output")
        keep(block, ("output", n), "output")
    keep(model.norm, ("final_norm", None), "output")
    model.forward_features(images)
    for handle in handles:
        handle.remove()
    for (at, n), tensor in list(caught.items()):
        if at == "qkv":  # after the qk-norm, head by head
            attn = model.blocks[n - 1].attn
            q, k, v = tensor.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
            caught[at, n] = torch.stack((attn.q_norm(q), attn.k_norm(k), v), 2).flatten(2)
    return caught


def wanted(caught, place):
    if place.at == "class_token":
        return caught["final_norm", None][:, 0]
    if place.after_residual:
        return caught["output" if place.at == "mlp" else "attention after", place.block]
    return caught[place.at, place.block]


KINDS = [
    {},
    {"class_token": False},
    {"reg_tokens": 4},
    {"reg_tokens": 2, "no_embed_class": True},
    {"pos_embed": "none"},
    {"qk_norm": True},
    {"scale_attn_norm": True},
    {"init_values": 1e-1},
    {"pre_norm": True},
    {"dynamic_img_size": True},
    {"img_size": 64},
    {"patch_size": 16},
]


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_the_projection_is_what_the_whole_model_computes(kwargs, block):
    """Bitwise, one place: what relation distillation reads."""
    model = build(**kwargs)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    place = Place("qkv", block)
    taps = Taps(model, [place])
    got = taps(images)[place]
    torch.testing.assert_close(got, wanted(by_hooks(model, images), place), rtol=0, atol=0)
    assert got.shape == (2, taps.num_tokens, taps.widths[place])


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_every_place_alone_and_all_at_once(kwargs):
    model = build(**kwargs)
    has_norm = not isinstance(model.norm, torch.nn.Identity)
    places = EVERYWHERE if has_norm else [p for p in EVERYWHERE if p.block]
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    caught = by_hooks(model, images)
    together = Taps(model, places)
    found = together(images)
    assert list(found) == places
    for place in places:
        alone = Taps(model, [place])(images)[place]
        torch.testing.assert_close(alone, wanted(caught, place), rtol=0, atol=0, msg=str(place))
        # behind a tapped projection the attention is ours, with other strides into the same kernel
        torch.testing.assert_close(found[place], wanted(caught, place), rtol=1e-5, atol=1e-5, msg=str(place))
        assert found[place].shape[-1] == together.widths[place]


def test_a_tapped_attention_that_goes_on_is_as_exact_as_timms():
    """Ours after the projection, with a gate, against fp64."""
    model = build()
    for block in model.blocks:
        block.attn.gate = torch.nn.Linear(48, 48)
    images = torch.randn(2, 3, 32, 32)
    places = [Place("qkv", n) for n in (1, 2, 3, 4)] + [Place("final_norm")]
    ours = Taps(model, places)(images)[places[-1]]
    theirs = model.forward_features(images)
    exact = copy.deepcopy(model).double().forward_features(images.double())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


def test_the_model_stays_whole():
    model = build()
    images = torch.randn(2, 3, 32, 32)
    before, names = model.forward_features(images), list(model.state_dict())
    taps = Taps(model, [Place("qkv", 2)])
    assert list(model.state_dict()) == names
    assert torch.equal(model.forward_features(images), before)
    assert taps.model.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight, "weights are shared, not copied"
    assert taps.model.blocks[1].attn.qkv.weight is model.blocks[1].attn.qkv.weight


def test_nothing_behind_the_last_place_is_held():
    taps = Taps(build(), [Place("qkv", 2)])
    names = [name for name, _ in taps.named_parameters()]
    assert not any(name.startswith(("model.blocks.2", "model.norm", "model.head")) for name in names)
    assert {name for name in names if "blocks.1." in name} == {
        f"model.blocks.1.{part}.{kind}" for part in ("norm1", "attn.qkv") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("place", EVERYWHERE, ids=str)
def test_every_parameter_that_is_held_gets_a_gradient(place):
    taps = Taps(build(reg_tokens=2, init_values=0.1, qk_norm=True), [place])
    # of two images, lest a norm over equal gradients cancels; squares, lest a LayerNorm's mean does
    (taps(torch.randn(2, 3, 32, 32))[place] ** 3).sum().backward()
    lacking = {n for n, p in taps.named_parameters() if p.grad is None or not p.grad.any()}
    assert lacking == set()


def test_no_more_is_computed_than_the_last_place_needs():
    """Multiply-adds of each place, counted, against arithmetic: products 3, 1, 8 C^2 a token, attention 2 N C."""
    model = build()
    images = torch.randn(1, 3, 32, 32)
    n, c, patches = 17, 48, 16
    embed = patches * 3 * 8 * 8 * c
    qkv, attend, mlp = n * 3 * c * c, 2 * n * n * c + n * c * c, n * 8 * c * c
    block = qkv + attend + mlp

    def macs(*places):
        taps = Taps(model, places)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            taps(images)
        return counter.get_total_flops() / 2

    assert macs(Place("input", 1)) == macs(Place("norm1", 1)) == embed
    assert macs(Place("qkv", 3)) == embed + 2 * block + qkv
    assert macs(Place("attention", 3)) == macs(Place("attention", 3, True)) == embed + 2 * block + qkv + attend
    assert macs(Place("output", 3)) == macs(Place("mlp", 3)) == macs(Place("input", 4)) == embed + 3 * block
    assert macs(Place("qkv", 1), Place("attention", 2), Place("qkv", 3)) == embed + 2 * block + qkv
    assert macs(*EVERYWHERE) == embed + 4 * block, "nothing is computed twice"


def compiled(taps):
    torch._dynamo.reset()
    return torch.compile(taps, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("places", [[Place("qkv", 3)], EVERYWHERE], ids=["one", "all"])
def test_compiles_without_a_graph_break(places):
    """The traced operations are the eager ones, gradients too."""
    model = build(init_values=0.1)
    taps = Taps(model, places)
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for run in (taps, compiled(taps)):
        model.zero_grad()
        found = run(images)
        sum((tensor**2).sum() for tensor in found.values()).backward()
        grads.append((found, model.patch_embed.proj.weight.grad.clone()))
    (eager, grad), (graph, grad_of_graph) = grads
    assert list(eager) == list(graph)
    for place in places:
        assert torch.equal(eager[place], graph[place]), place
    torch.testing.assert_close(grad_of_graph, grad)


@pytest.mark.parametrize("block", [0, 5, -1, None])
def test_block_out_of_range(block):
    with pytest.raises(InputError, match=rf"block: got {block}, want 1 to 4"):
        Taps(build(), [Place("qkv", block)])


@pytest.mark.parametrize(
    ("place", "kwargs", "message"),
    [
        (Place("keys", 1), {}, "places: got a place 'keys', want one of input, norm1"),
        (Place("qkv", 1, True), {}, "want attention or mlp with after_residual"),
        (Place("final_norm", 2), {}, "want no block with final_norm"),
        (Place("final_norm"), {"global_pool": "avg"}, "no norm behind its last block"),
        (Place("class_token"), {"class_token": False, "fc_norm": False}, "this model has none"),
    ],
    ids=str,
)
def test_places_that_a_model_does_not_have(place, kwargs, message):
    with pytest.raises(InputError, match=message):
        Taps(build(**kwargs), [place])


def test_prefix_tokens_come_first():
    """The last block's input normalised is what `get_intermediate_layers` gives, its prefix left out."""
    model = build(reg_tokens=3)
    images = torch.randn(1, 3, 32, 32)
    before_last = model.get_intermediate_layers(images, n=[2], return_prefix_tokens=False)[0]
    norm1 = model.blocks[3].norm1
    want = F.layer_norm(before_last, (48,), norm1.weight, norm1.bias, norm1.eps)
    taps = Taps(model, [Place("norm1", 4)])
    got = taps(images)[Place("norm1", 4)]
    assert taps.num_prefix_tokens == 4
    torch.testing.assert_close(got[:, 4:], want)
