"""Distillation by token relations as a task of timm's training script."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from tinymim_fast.kernels import RelationLoss
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import check_supported, default_target_block


class _Projection(nn.Module):
    """The packed qkv projection of one block, and nothing computed or held behind it."""

    def __init__(self, vit: VisionTransformer, block: int):
        super().__init__()
        self.taps = Taps(vit, [Place("qkv", block)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, N, 3 C) from (B, 3, H, W)."""
        (qkv,) = self.taps(images).values()
        return qkv


class RelationDistillationTask(TrainingTask):
    """A student ViT learns the token relations of a frozen teacher; labels are not looked at.

    What trains ends at the student's tapped projection, so that no parameter lacks a gradient under
    DistributedDataParallel; evaluation and checkpoints have the whole student.

    Args:
        student_model: timm VisionTransformer.
        teacher_model: likewise; frozen, in evaluation mode.
        relation_heads: must divide both widths; default the heads of the teacher's block.
        relations: any of "qk", "vv", "qq", "kk".
        weights: of the relations, 1 each by default.
        target_block: the teacher's, 1-based; default 18 of 24 blocks, else the last.
        backend: of the loss, see `relation_loss`.
        device: of the task, as in timm.
        dtype: of the task, as in timm.
        verbose: as in timm.

    Raises:
        InputError: not plain VisionTransformers, or no such block.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        *,
        relation_heads: int | None = None,
        relations: Sequence[str] = ("qk", "vv"),
        weights: Mapping[str, float] | Sequence[float] | None = None,
        target_block: int | None = None,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        for name, model in (("student_model", student_model), ("teacher_model", teacher_model)):
            check_supported(model, name)
        block = target_block or default_target_block(len(teacher_model.blocks))
        self.teacher = _Projection(teacher_model.eval().requires_grad_(False), block)
        self.eval_model = student_model
        self.trainable_module = _Projection(student_model, len(student_model.blocks))
        heads = relation_heads or teacher_model.blocks[block - 1].attn.num_heads
        self.criterion = RelationLoss(heads, relations=relations, weights=weights, backend=backend)
        self._student = [student_model]  # as it is, whatever wraps it later
        self._renormalise(student_model.pretrained_cfg, teacher_model.pretrained_cfg)

    def _renormalise(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Buffers a, b: the teacher's view is a x + b of the student's, so that each has its mean and deviation."""
        (mean, std), (mean_t, std_t) = (
            [torch.tensor(cfg[key], device=self.device, dtype=torch.float64) for key in ("mean", "std")]
            for cfg in (ours, theirs)
        )
        scale, shift = std / std_t, (mean - mean_t) / std_t
        self.same_view = bool((scale == 1).all() and (shift == 0).all())
        for name, values in (("scale_t", scale), ("shift_t", shift)):
            self.register_buffer(name, values.to(self.dtype).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> RelationDistillationTask:
        """The student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile both projections and the student that is evaluated, which is returned."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.teacher = torch.compile(self.teacher, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.eval_model = torch.compile(self.eval_model, **options)
        return self.eval_model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> RelationDistillationTask:
        """Wrap what trains in DistributedDataParallel."""
        parallel = nn.parallel.DistributedDataParallel
        self.trainable_module = parallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """An average of what trains, and the whole student with it, for evaluation and checkpoints."""
        average = super().setup_ema(*args, **kwargs)
        held = unwrap_model(average.module).taps.model
        device = next(held.parameters()).device
        whole = copy.deepcopy(self._student[0]).requires_grad_(False).eval().to(device)
        for name, tensor in [*held.named_parameters(), *held.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, tensor)
        self.eval_model_ema = whole
        return average

    def forward(self, input: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """{"loss": to minimise, "output": the student's projection (B, N, 3 C), and each relation's loss}.

        Args:
            input: (B, 3, H, W), normalised for the student.
            target: not looked at.
        """
        qkv_s = self.trainable_module(input)
        with torch.no_grad():
            qkv_t = self.teacher(input if self.same_view else self.scale_t * input + self.shift_t)
        return {"output": qkv_s, **self.criterion(qkv_s, qkv_t)}
