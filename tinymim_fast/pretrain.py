"""Pre-train a masked autoencoder: a teacher for data that has none.

deepspeed tinymim_fast/pretrain.py --config tinymim_fast/recipes/NAME.yaml --data-path DIR --output-dir DIR \
    [--any-field-of-the-configuration VALUE]
"""

from __future__ import annotations

import os
import sys

# Before torch starts OpenMP: threads that spin while they wait take the cores from those that decode. A short spin was
# fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Started as a file, this folder is first on the path, and its modules are not top-level ones.
if __package__ in (None, ""):
    sys.path.pop(0)

from collections.abc import Sequence
from pathlib import Path

import torch

from tinymim_fast.config import PretrainConfig, to_dict
from tinymim_fast.distributed import World
from tinymim_fast.errors import flags
from tinymim_fast.models.checkpoints import ModelInfo, read_weights
from tinymim_fast.models.mae import MaskedAutoencoder
from tinymim_fast.models.vit import create_vit, head_layout
from tinymim_fast.training import loop as training

PREFIX = "encoder."


def build_task(config: PretrainConfig, world: World, checkpoint: Path | None) -> training.Task:
    with flags(model="--model", model_kwargs="--model-kwargs", mask_ratio="--mask-ratio"):
        encoder = create_vit(config.model, img_size=config.img_size, **config.model_kwargs)
        layout = head_layout(encoder)
        model = MaskedAutoencoder(
            encoder,
            mask_ratio=config.mask_ratio,
            decoder_embed_dim=config.decoder_embed_dim,
            decoder_depth=config.decoder_depth,
            decoder_num_heads=config.decoder_num_heads,
            norm_pix_loss=config.norm_pix_loss,
        )
    if checkpoint is not None:
        saved, _ = read_weights(checkpoint)
        model.load_state_dict({_engine_name(name): tensor for name, tensor in saved.items()})
    initial = {name.removeprefix(PREFIX): tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def weights(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**initial, **{name.removeprefix(PREFIX): tensor for name, tensor in trained.items()}}

    return training.Task(
        model=model,
        prepare=lambda views: views,
        parts=("loss",),
        views=1,
        color_jitter=0.0,
        weights=weights,
        info=ModelInfo(
            architecture=config.model,
            model_kwargs={**config.model_kwargs, "img_size": config.img_size},
            kind="mae",
            head_layout=layout,
            recipe=to_dict(config),
        ),
    )


def _engine_name(name: str) -> str:
    """Name in `MaskedAutoencoder` of a weight that is saved under MAE's name."""
    return name if name.startswith(("decoder_", "mask_token")) else PREFIX + name


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(PretrainConfig, build_task, argv, "pretrain.py")


if __name__ == "__main__":
    sys.exit(main())
