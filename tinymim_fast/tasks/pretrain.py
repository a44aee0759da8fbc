"""Masked-autoencoder pre-training: a teacher for data that has none."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.config import RunConfig, to_dict
from tinymim_fast.errors import flags

if TYPE_CHECKING:
    import torch

    from tinymim_fast.data import ImageIndex
    from tinymim_fast.distributed import World
    from tinymim_fast.training.task import Task

logger = logging.getLogger("tinymim_fast")
PREFIX = "encoder."  # of the encoder's weights under the engine


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A masked-autoencoder pre-training run (He et al., CVPR 2022, arXiv 2111.06377).

    Args:
        model: timm name of the encoder, a VisionTransformer with a class token.
        model_kwargs: passed to `timm.create_model`.
        mask_ratio: share of the patches that the encoder does not see.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        norm_pix_loss: normalise each patch's pixels before comparing.
    """

    model: str = "vit_base_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    mask_ratio: float = 0.75
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("mask_ratio", 0 < self.mask_ratio < 1, "a share between 0 and 1")
        self._check("decoder_depth", self.decoder_depth > 0, "more than 0")
        self._check("decoder_num_heads", self.decoder_num_heads > 0, "more than 0")
        self._check(
            "decoder_embed_dim",
            self.decoder_embed_dim > 0 and self.decoder_embed_dim % (4 * self.decoder_num_heads) == 0,
            f"a multiple of 4 x decoder_num_heads ({4 * self.decoder_num_heads})",
        )


def build_task(
    config: PretrainConfig, world: "World", checkpoint: Path | None, images: "ImageIndex | None" = None
) -> "Task":
    """A masked autoencoder.

    Args:
        config: of the run.
        world: this process.
        checkpoint: to take the weights from; None for fresh ones, from torch's random numbers.
        images: to train on; no task here depends on them.

    Raises:
        InputError: a model or checkpoint that can't be used.
    """
    import torch

    from tinymim_fast.models.attention import use_attention
    from tinymim_fast.models.checkpoints import WEIGHTS, read_weights
    from tinymim_fast.models.mae import MaskedAutoencoder
    from tinymim_fast.models.model_info import ModelInfo
    from tinymim_fast.models.vit import check_heads, create_vit, head_layout, keep_batch_norm_fp32, whole_blocks
    from tinymim_fast.models.weights_file import check_finite
    from tinymim_fast.training.task import Task, saved_buffers, train_view, without_prefix

    encoder = create_vit(config.model, img_size=config.img_size, **config.model_kwargs)
    layout = head_layout(encoder)
    keep_batch_norm_fp32(encoder)
    model = MaskedAutoencoder(
        encoder,
        mask_ratio=config.mask_ratio,
        decoder_embed_dim=config.decoder_embed_dim,
        decoder_depth=config.decoder_depth,
        decoder_num_heads=config.decoder_num_heads,
        norm_pix_loss=config.norm_pix_loss,
    )
    if checkpoint is not None:
        saved, info = read_weights(checkpoint / WEIGHTS)
        with flags(source="output_dir"):
            check_finite(saved, checkpoint)
        if info is not None:
            check_heads(encoder, info.head_layout.get("num_heads", []), checkpoint)
        model.load_state_dict({_engine_name(name): tensor for name, tensor in saved.items()})
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    attention = use_attention(model, config.attention, world.device, dtype, gradients=True)
    logger.info("masked autoencoder: %s, attention %s", "bf16" if config.bf16 else "fp32", attention)
    initial = {name: tensor.detach().clone() for name, tensor in without_prefix(model.state_dict(), PREFIX).items()}

    def weights(trained: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {**initial, **saved_buffers(encoder, initial), **without_prefix(trained, PREFIX)}

    return Task(
        model=model,
        prepare=lambda views: views,
        parts=("loss",),
        view=train_view(config, world),
        weights=weights,
        info=ModelInfo(
            architecture=config.model,
            model_kwargs={**config.model_kwargs, "img_size": config.img_size},
            kind="mae",
            head_layout=layout,
            recipe=to_dict(config),
        ),
        regions=whole_blocks(model),
    )


def _engine_name(name: str) -> str:
    """Name in `MaskedAutoencoder` of a weight that is saved under MAE's name."""
    return name if name.startswith(("decoder_", "mask_token")) else PREFIX + name
