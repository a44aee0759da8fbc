"""Masked patches' pixels as the target: the reconstruction of a masked autoencoder, beside other targets."""

from __future__ import annotations

from dataclasses import fields

import torch
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.models.mae import PixelDecoder
from tinymim_fast.models.taps import Place
from tinymim_fast.targets.settings import Pixels, TargetSettings
from tinymim_fast.targets.target import Target, check_places


class PixelTarget(Target):
    """The student's view, painted from its visible patches: see `PixelDecoder`.

    Args:
        settings: of it.
        student: its shape is read.

    Raises:
        InputError: no final norm, or tokens that are no patches.

    Source: MAE, arXiv 2111.06377; beside a class token's or relations' loss in TinyMIM, arXiv 2301.01296.
    """

    def __init__(self, settings: Pixels, student: VisionTransformer):
        check_places(["final_norm"], "kind", student=student)
        embed = student.patch_embed
        if tuple(p * g for p, g in zip(embed.patch_size, embed.grid_size)) != tuple(embed.img_size):
            raise InputError("the student's tokens are no patches of the image; leave pixels out", argument="kind")
        super().__init__(settings, [Place("final_norm")], [])
        of_decoder = {f.name for f in fields(Pixels)} - {f.name for f in fields(TargetSettings)}
        self.decoder = PixelDecoder(student, **{name: getattr(settings, name) for name in of_decoder})

    def forward(
        self, of_student: tuple[torch.Tensor, ...], images: torch.Tensor, shuffle: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{"loss": fp32 scalar}.

        Args:
            of_student: the final norm's output of prefix and visible patches, (B, P + V, C).
            images: the student's view, (B, 3, H, W).
            shuffle: the patches' order, (B, L); the first V are visible.
        """
        return {"loss": self.decoder(of_student[0], images, shuffle)}
