import pytest
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models.mae import MaskedAutoencoder
from tinymim_fast.models.vit import create_vit


def build(**kwargs):
    torch.manual_seed(0)
    encoder = create_vit(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **kwargs
    )
    return MaskedAutoencoder(
        encoder, mask_ratio=0.75, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True
    )


def test_loss_is_the_formula_on_masked_patches(monkeypatch):
    """Against loops over patches and pixels, in fp64, with a known mask."""
    model = build().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: noise)
    got = model(images)["loss"]

    shuffle = noise.argsort(1)
    predicted = model.decode(model.encode(images, shuffle[:, :4]), shuffle.argsort(1))
    errors = []
    for b in range(2):
        for patch in shuffle[b, 4:].tolist():  # the 12 patches that the encoder did not see
            row, column = divmod(patch, 4)
            pixels = images[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append(((predicted[b, patch] - target) ** 2).mean())
    torch.testing.assert_close(got, torch.stack(errors).mean().to(got.dtype))


def test_encoder_sees_visible_patches_only():
    model = build()
    images = torch.randn(1, 3, 32, 32)
    visible = torch.tensor([[1, 5, 6, 11]])
    before = model.encode(images, visible)
    hidden = images.clone()
    hidden[..., :8, :8] = 9.0  # patch 0
    assert torch.equal(before, model.encode(hidden, visible))
    shown = images.clone()
    shown[..., :8, 8:16] = 9.0  # patch 1
    assert not torch.equal(before, model.encode(shown, visible))
    assert before.shape == (1, 5, 48)


def test_every_trained_weight_gets_a_gradient():
    model = build()
    model(torch.randn(4, 3, 32, 32))["loss"].backward()
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert untouched == []
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"encoder.pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("kwargs", [{"reg_tokens": 2}, {"class_token": False}, {"pos_embed": "none"}], ids=str)
def test_encoders_that_mae_does_not_fit(kwargs):
    with pytest.raises(InputError, match="model: "):
        build(**kwargs)
