"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377)."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models.masking import gather_tokens, num_visible, shuffled_patches
from tinymim_fast.models.vit import init_mae_style, sincos_2d


class PixelDecoder(nn.Module):
    """A small decoder that paints the patches that an encoder did not see.

    The loss is the mean squared error of the masked patches' pixels:
    `mean over masked patches of mean_p (decoder(x)_p - target_p)^2`, the target normalised per patch
    (`(pixels - mean) / sqrt(var + 1e-6)`) if `norm_pix_loss`.

    Args:
        encoder: whose final norm's output it takes; only its shape is read here.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: heads of the decoder.
        norm_pix_loss: see above.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        norm_pix_loss: bool,
    ):
        super().__init__()
        self._take_over(encoder)
        self.patch_size = encoder.patch_embed.patch_size
        self.num_prefix_tokens = prefix = encoder.num_prefix_tokens
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        embed = sincos_2d(encoder.patch_embed.grid_size, decoder_embed_dim, prefix)
        self.decoder_pos_embed = nn.Parameter(embed, requires_grad=False)
        norm_layer = type(encoder.blocks[0].norm1)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * self.patch_size[0] * self.patch_size[1])
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def _take_over(self, encoder: VisionTransformer) -> None:
        """Before the decoder is made; here the encoder is another module's."""

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels by patch, (B, L, patch_h * patch_w * 3), from images (B, 3, H, W)."""
        h, w = self.patch_size
        x = images.unflatten(2, (-1, h)).unflatten(4, (-1, w))  # (B, 3, rows, h, columns, w)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def decode(self, latent: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Predicted pixels of all patches, (B, L, patch pixels); `restore` (B, L) undoes the shuffle."""
        x, prefix = self.decoder_embed(latent), self.num_prefix_tokens
        num_masked = restore.shape[1] + prefix - x.shape[1]
        x = torch.cat((x, self.mask_token.to(x.dtype).expand(x.shape[0], num_masked, -1)), dim=1)
        x = gather_tokens(x, restore, prefix) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, prefix:]

    def forward(self, latent: torch.Tensor, images: torch.Tensor, shuffle: torch.Tensor) -> torch.Tensor:
        """The loss, an fp32 scalar.

        Args:
            latent: final norm's output of prefix and visible patches, (B, P + V, C).
            images: what the encoder was given, (B, 3, H, W).
            shuffle: the patches' order, (B, L); the first V are visible.
        """
        restore = shuffle.argsort(dim=1)
        predicted = self.decode(latent, restore).float()
        target = self.patchify(images).float()
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        masked = (restore >= latent.shape[1] - self.num_prefix_tokens).float()  # (B, L)
        return (((predicted - target) ** 2).mean(-1) * masked).sum() / masked.sum()


class MaskedAutoencoder(PixelDecoder):
    """An encoder that sees a random share of the patches, and a small decoder that paints the others.

    Args:
        encoder: timm VisionTransformer with a class token and absolute position embeddings; taken over and initialised.
        mask_ratio: share of patches hidden.
        decoder_embed_dim, decoder_depth, decoder_num_heads, norm_pix_loss: see `PixelDecoder`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        norm_pix_loss: bool,
    ):
        if (
            encoder.num_prefix_tokens != 1
            or encoder.no_embed_class
            or encoder.pos_embed is None
            or encoder.dynamic_img_size
        ):
            raise InputError(
                "masked-autoencoder pre-training wants a class token, absolute position embeddings that include it, no "
                "register tokens and a fixed image size",
                argument="model",
            )
        visible = num_visible(mask_ratio, encoder.patch_embed.num_patches)
        init_mae_style(encoder, pos_embed="sincos")
        super().__init__(
            encoder,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            norm_pix_loss=norm_pix_loss,
        )
        self.num_visible = visible

    def _take_over(self, encoder: VisionTransformer) -> None:
        self.encoder = encoder

    def encode(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Class token and visible patches, (B, 1 + V, C), from images and patch numbers `visible` (B, V)."""
        vit = self.encoder
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = gather_tokens(x, visible, 0)
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat((cls, x), dim=1))))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstruction loss, {"loss": fp32 scalar}, of images (B, 3, H, W)."""
        shuffle = shuffled_patches(images.shape[0], self.encoder.patch_embed.num_patches, images.device)
        return {"loss": super().forward(self.encode(images, shuffle[:, : self.num_visible]), images, shuffle)}
