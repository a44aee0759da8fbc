"""Inputs of tiny runs: drawn images and a teacher nobody trained."""

from __future__ import annotations

from pathlib import Path

from support.programs import TEACHER


def draw_images(folder: Path) -> Path:
    """`folder`/train and `folder`/val with 16 classes, 6 and 2 drawn JPEGs each; returns `folder`."""
    from tinymim_fast.data import draw_image_folder

    draw_image_folder(folder, num_train_per_class=6, num_val_per_class=2, size=48, seed=0)
    return folder


def save_teacher(path: Path) -> Path:
    """An untrained teacher in the layout of MAE's release, {"model": {...}} with a decoder; returns `path`."""
    import timm
    import torch

    from tinymim_fast.models.mae import MaskedAutoencoder

    torch.manual_seed(1)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TEACHER)
    mae = MaskedAutoencoder(
        encoder, mask_ratio=0.75, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True
    )
    state = {name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()}
    torch.save({"model": state}, path)
    return path
