"""Small images, a small teacher, and one process group for the tests that stay in this process."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: spinning threads starve the other processes of a test

import pytest

from support.programs import TEACHER

# Without a GPU, Triton kernels run in its interpreter; it reads the variable when it is imported.
if not Path("/dev/nvidia0").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """DIR/train and DIR/val with 16 classes, 6 and 2 drawn JPEGs each."""
    from tinymim_fast.data import draw_image_folder

    folder = tmp_path_factory.mktemp("images") / "drawn"
    draw_image_folder(folder, num_train_per_class=6, num_val_per_class=2, size=48, seed=0)
    return folder


@pytest.fixture(scope="session")
def world():
    """A process group of one, with one thread: sums come in the same order as in `start_training`'s processes."""
    import torch

    from tinymim_fast import engine

    torch.set_num_threads(1)

    kept = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    yield engine.start()
    engine.stop()
    for key, value in kept.items():
        if value is None:
            os.environ.pop(key, None)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """An untrained teacher in the layout of the official MAE release: {"model": {...}}, with a decoder."""
    import torch

    from tinymim_fast.models.mae import MaskedAutoencoder
    from tinymim_fast.models.vit import create_vit

    torch.manual_seed(1)
    encoder = create_vit("vit_tiny_patch16_224", img_size=32, flag="test", **TEACHER)
    mae = MaskedAutoencoder(
        encoder, mask_ratio=0.75, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True
    )
    state = {name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()}
    path = tmp_path_factory.mktemp("teacher") / "mae_pretrain.pth"
    torch.save({"model": state}, path)
    return path
