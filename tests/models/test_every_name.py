"""timm's vision transformers, every name: an accepted student trains, is saved and loads; the others are refused."""

import pytest
import timm
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import load_encoder, save_weights
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import (
    create_vit,
    head_layout,
    init_mae_style,
    keep_batch_norm_fp32,
    set_constant_drop_path,
)

KINDS = ("vision_transformer", "vit", "deit", "beit", "eva", "hiera")


def modules():
    return sorted({module for module in timm.list_modules() if any(kind in module for kind in KINDS)})


def small(name):
    """The model with two blocks of width 48, or of its own width where its convolutions end in that."""
    with torch.device("meta"):
        whole = create_vit(name, img_size=224, depth=1)
    embed = whole.patch_embed
    hybrid = hasattr(embed, "backbone")
    size = 64 if hybrid else 2 * embed.patch_size[0]
    ends_in_width = hybrid and isinstance(embed.proj, torch.nn.Identity)
    width = {} if ends_in_width else {"embed_dim": 48, "num_heads": 3}
    kwargs = {"depth": 2, **width}
    return create_vit(name, img_size=size, **kwargs), {**kwargs, "img_size": size}


@pytest.mark.fault(
    "any vision transformer of timm's as a student", "trains, is saved and loads, or is refused at the start", tries=508
)
@pytest.mark.slow
@pytest.mark.parametrize("module", modules())
def test_a_student_that_is_accepted_trains(module, tmp_path):
    """Another error than a refusal, a weight without a gradient, or a file that does not come back is a failure."""
    accepted, seen = 0, set()
    for name in timm.list_models(module=module):
        torch.manual_seed(0)
        try:
            model, kwargs = small(name)
        except InputError as refusal:
            assert name in str(refusal)
            continue
        accepted += 1
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in model.state_dict().items())
        built = (repr(model), shapes, model.no_embed_class, model.dynamic_img_size, model.global_pool)
        if built in seen:  # names of other weights for the same network
            continue
        seen.add(built)
        init_mae_style(model, pos_embed="sincos")
        set_constant_drop_path(model, 0.1)
        keep_batch_norm_fp32(model)
        place = Place("qkv", 2)
        taps = Taps(model, [place]).train()
        qkv = taps(torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"]))[place]
        assert qkv.shape == (2, taps.num_tokens, taps.widths[place]) and qkv.isfinite().all(), name
        (qkv**3).sum().backward()
        lacking = [n for n, p in taps.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking, (name, lacking)
        save_weights(tmp_path, model.state_dict(), ModelInfo(name, kwargs, "tinymim", head_layout(model)))
        again = load_encoder(str(tmp_path))[0].state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items()), name
    if module in ("vision_transformer", "vision_transformer_hybrid"):
        assert accepted >= 10, "timm's plain models are what this is for"
