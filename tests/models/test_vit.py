import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from tinymim_fast.errors import InputError
from tinymim_fast.models.vit import (
    check_supported,
    create_vit,
    default_target_block,
    init_mae_style,
    set_constant_drop_path,
    sincos_2d,
)

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.mark.parametrize("name", ["resnet10t", "eva02_tiny_patch14_224", "no_such_model"])
def test_other_models_are_refused(name):
    with pytest.raises(InputError, match=f"model: .*{name}"):
        create_vit(name, img_size=224)


@pytest.mark.parametrize("block_fn", [ResPostBlock, ParallelScalingBlock])
def test_other_blocks_are_refused(block_fn):
    with pytest.raises(InputError, match=f"block 1 is a {block_fn.__name__}"):
        check_supported(timm.create_model("vit_tiny_patch16_224", img_size=32, block_fn=block_fn, **SMALL), "m")


def test_heads_that_dont_divide_the_width_are_refused():
    with pytest.raises(InputError, match="model: vit_tiny_patch16_224"):
        create_vit("vit_tiny_patch16_224", img_size=32, **{**SMALL, "num_heads": 5})


def test_initial_weights():
    torch.manual_seed(0)
    model = create_vit("vit_tiny_patch16_224", img_size=224)
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
    model = create_vit("vit_tiny_patch16_224", img_size=32, **SMALL)
    set_constant_drop_path(model, 0.1)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]
    assert rates == [0.1, 0.1, 0.1, 0.0]


def test_target_block_defaults():
    assert default_target_block(24) == 18 and default_target_block(12) == 12
