"""Relations of patches' normalised features, one head: what LightlyTrain's local loss is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tinymim_fast.kernels import relation_kl
from tinymim_fast.models.taps import Place
from tinymim_fast.targets.settings import Local
from tinymim_fast.targets.target import Target, check_patches, linear, mean_of, pairs_at

PLACES = {"block_output": "output"}  # of settings.LOCAL_PLACES, in taps


class LocalTarget(Target):
    """What patches are like which others, of one pair of blocks or the mean over several.

    `mean over b, i of KL(softmax_j(t_i . t_j / T) || softmax_j(s_i . s_j / T))` over patches, s and t the features of
    length 1, s behind a linear layer if `projection`.

    Args:
        settings: with blocks.
        student, teacher: their shapes are read.
        backend: of `relation_kl`.

    Raises:
        InputError: another number of patches, or no final norm.

    Source: LightlyTrain's distillationv3 (temperature 0.07, linear projection of the student).
    """

    def __init__(self, settings: Local, student: VisionTransformer, teacher: VisionTransformer, backend: str):
        at = PLACES.get(settings.place, settings.place)
        pairs = pairs_at(at, settings, student, teacher)
        places_s, places_t = ([Place(at, block) for block in blocks] for blocks in zip(*pairs, strict=True))
        super().__init__(settings, places_s, places_t)
        check_patches(student, teacher)
        self.scale, self.backend = 1 / settings.temperature, backend
        self.prefix = student.num_prefix_tokens, teacher.num_prefix_tokens
        width_s, width_t = student.embed_dim, teacher.embed_dim
        self.widths = (width_t if settings.projection else width_s, width_t)
        self.projections = nn.ModuleList(linear(width_s, width_t) for _ in pairs if settings.projection)

    def forward(
        self, of_student: tuple[torch.Tensor, ...], of_teacher: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """{"loss": fp32 scalar} from features (B, N, C) of each pair."""
        prefix_s, prefix_t = self.prefix
        losses = []
        for number, (f_s, f_t) in enumerate(zip(of_student, of_teacher, strict=True)):
            f_s, f_t = f_s[:, prefix_s:], f_t[:, prefix_t:]
            if self.projections:
                f_s = self.projections[number](f_s)
            losses.append({"loss": self._loss(f_s, f_t)})
        return mean_of(losses)

    def _loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        s, t = (F.normalize(f, dim=-1)[:, None] for f in (f_s, f_t))
        return relation_kl(s, s, t, t, scale_s=self.scale, scale_t=self.scale, backend=self.backend)

    def try_on(self, device: torch.device, dtype_s: torch.dtype, dtype_t: torch.dtype) -> None:
        """The loss of one patch's ones."""
        tokens = zip(self.widths, (dtype_s, dtype_t), strict=True)
        self._loss(*(torch.ones(1, 1, width, dtype=dtype, device=device) for width, dtype in tokens))
