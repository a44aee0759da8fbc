import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from tinymim_fast.errors import InputError
from tinymim_fast.models.vit import (
    TappedViT,
    create_vit,
    default_target_block,
    init_mae_style,
    set_constant_drop_path,
    sincos_2d,
)

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def qkv_by_hook(model, block, images):
    """What the qkv projection of `block` (1-based) gives in the whole model, as (B, N, 3, H, D) after qk-norm."""
    caught = {}
    attn = model.blocks[block - 1].attn
    handle = attn.qkv.register_forward_hook(lambda module, inputs, output: caught.update(qkv=output))
    model.forward_features(images)
    handle.remove()
    q, k, v = caught["qkv"].unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    return torch.stack((attn.q_norm(q), attn.k_norm(k), v), 2).flatten(2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"class_token": False},
        {"reg_tokens": 4},
        {"reg_tokens": 2, "no_embed_class": True},
        {"pos_embed": "none"},
        {"qk_norm": True},
        {"init_values": 1e-1},
        {"pre_norm": True},
        {"dynamic_img_size": True},
        {"img_size": 64},
        {"patch_size": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_tap_is_what_the_whole_model_computes(kwargs, block):
    torch.manual_seed(0)
    kwargs = {**SMALL, "img_size": 32, **kwargs}
    size = kwargs.pop("img_size")
    model = create_vit("vit_tiny_patch16_224", img_size=size, flag="f", **kwargs).eval()
    for module in model.modules():  # norms that are not the identity
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    images = torch.randn(2, 3, size, size)
    want = qkv_by_hook(model, block, images)
    tap = TappedViT(model, block)
    got = tap(images)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.shape == (2, tap.num_tokens, 3 * tap.qkv_dim)


def test_nothing_behind_the_tap_remains():
    tap = TappedViT(create_vit("vit_tiny_patch16_224", img_size=32, flag="f", **SMALL), 2)
    names = [name for name, _ in tap.named_parameters()]
    assert not any(
        name.startswith(("model.blocks.2", "model.norm", "model.head", "model.blocks.1.mlp")) for name in names
    )
    assert {name for name in names if "blocks.1." in name} == {
        f"model.blocks.1.{part}.{kind}" for part in ("norm1", "attn.qkv") for kind in ("weight", "bias")
    }
    tap(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in tap.named_parameters()), "each gets a gradient"


@pytest.mark.parametrize("block", [0, 5, -1])
def test_block_out_of_range(block):
    with pytest.raises(InputError, match=rf"--target-block: got {block}, want 1 to 4"):
        TappedViT(create_vit("vit_tiny_patch16_224", img_size=32, flag="f", **SMALL), block)


@pytest.mark.parametrize("name", ["resnet10t", "eva02_tiny_patch14_224", "no_such_model"])
def test_other_models_are_refused(name):
    with pytest.raises(InputError, match=f"--student-model {name}"):
        create_vit(name, img_size=224, flag="--student-model")


@pytest.mark.parametrize("block_fn", [ResPostBlock, ParallelScalingBlock])
def test_other_blocks_are_refused(block_fn):
    with pytest.raises(InputError, match=f"block 1 is a {block_fn.__name__}"):
        create_vit("vit_tiny_patch16_224", img_size=32, flag="--student-model", block_fn=block_fn, **SMALL)


def test_heads_that_dont_divide_the_width_are_refused():
    with pytest.raises(InputError, match="--student-model"):
        create_vit("vit_tiny_patch16_224", img_size=32, flag="--student-model", **{**SMALL, "num_heads": 5})


def test_initial_weights():
    torch.manual_seed(0)
    model = create_vit("vit_tiny_patch16_224", img_size=224, flag="f")
    init_mae_style(model, pos_embed="sincos")
    qkv = model.blocks[3].attn.qkv
    bound = (6 / (192 + 3 * 192)) ** 0.5
    assert qkv.weight.abs().max() <= bound and qkv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert qkv.bias.abs().max() == 0
    fan_in = 3 * 16 * 16
    assert model.patch_embed.proj.weight.abs().max() <= (6 / (192 + fan_in)) ** 0.5
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.pos_embed.requires_grad and model.pos_embed[0, 0].abs().max() == 0
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_sincos_is_written_out():
    embed = sincos_2d((3, 5), 16, 1)[0]
    row, column, k = 2, 3, 1
    angle_x, angle_y = (torch.tensor(p * 10000 ** (-k / 4), dtype=torch.float64) for p in (column, row))
    got = embed[1 + row * 5 + column]
    want = torch.stack([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()]).float()
    torch.testing.assert_close(got[k::4], want)


def test_drop_path_is_constant_before_the_last_block():
    model = create_vit("vit_tiny_patch16_224", img_size=32, flag="f", **SMALL)
    set_constant_drop_path(model, 0.1)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]
    assert rates == [0.1, 0.1, 0.1, 0.0]


def test_target_block_defaults():
    assert default_target_block(24) == 18 and default_target_block(12) == 12


def test_attention_is_timms():
    """The tapped model's earlier blocks are timm's own, so features match a plain timm model."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **SMALL).eval()
    images = torch.randn(1, 3, 32, 32)
    before_last = model.get_intermediate_layers(images, n=[2], return_prefix_tokens=False)[0]
    norm1 = model.blocks[3].norm1
    want = F.layer_norm(before_last, (48,), norm1.weight, norm1.bias, norm1.eps)
    torch.testing.assert_close(TappedViT(model, 4).tokens(images)[:, 1:], want)
