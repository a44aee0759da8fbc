"""The class token as the target: its feature, and the teacher's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.models.taps import Place
from tinymim_fast.targets.features import feature_loss
from tinymim_fast.targets.settings import ClassToken, Logits
from tinymim_fast.targets.target import Target, check_places, linear

CLASS_TOKEN = Place("class_token")


class ClassTokenTarget(Target):
    """The class token behind the final norm: `mean over b, c of smooth_l1(W f_s + b, layer_norm(f_t); beta)`.

    Args:
        settings: of it.
        student, teacher: their shapes are read.

    Raises:
        InputError: a model without a class token.

    Source: TinyMIM, arXiv 2301.01296.
    """

    def __init__(self, settings: ClassToken, student: VisionTransformer, teacher: VisionTransformer):
        check_places(["class_token"], "kind", student=student, teacher=teacher)
        super().__init__(settings, [CLASS_TOKEN], [CLASS_TOKEN])
        self.beta = settings.beta
        self.projection = linear(student.embed_dim, teacher.embed_dim)

    def forward(
        self, of_student: tuple[torch.Tensor, ...], of_teacher: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """{"loss": fp32 scalar} from class tokens (B, C)."""
        return {"loss": feature_loss(self.projection(of_student[0]), of_teacher[0], self.beta)}


class LogitsTarget(Target):
    """The teacher's classes: `T^2 mean over b of KL(softmax(z_t / T) || softmax((W f_s + b) / T))`.

    f_s is the student's class token behind the final norm.

    Args:
        settings: of it.
        student, teacher: their shapes are read.

    Raises:
        InputError: a student without a class token, or a teacher without a classifier.

    Source: Hinton et al., arXiv 1503.02531; without labels.
    """

    def __init__(self, settings: Logits, student: VisionTransformer, teacher: VisionTransformer):
        check_places(["class_token"], "kind", student=student)
        check_places(["logits"], "kind", teacher=teacher)
        super().__init__(settings, [CLASS_TOKEN], [Place("logits")])
        self.temperature = settings.temperature
        self.projection = linear(student.embed_dim, teacher.num_classes)

    def forward(
        self, of_student: tuple[torch.Tensor, ...], of_teacher: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """{"loss": fp32 scalar} from the student's class tokens (B, C) and the teacher's logits (B, classes)."""
        logits_s, logits_t = self.projection(of_student[0]), of_teacher[0]
        dtype = torch.promote_types(logits_s.dtype, torch.float32)
        log_s, log_t = (torch.log_softmax(z.to(dtype) / self.temperature, dim=-1) for z in (logits_s, logits_t))
        return {"loss": self.temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)}
