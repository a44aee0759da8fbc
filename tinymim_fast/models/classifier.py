"""Classifiers: pre-trained encoders with a new head, their loss, and fine-tuned ones read back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.task import DistillationTeacher
from torch import nn

from tinymim_fast.errors import InputError, flags
from tinymim_fast.models.architecture import check_name
from tinymim_fast.models.checkpoints import WEIGHTS, find_weights, load_encoder, load_state, read_weights, restore
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.vit import create_vit, head_layout, init_mae_style, set_num_heads
from tinymim_fast.models.weights_file import check_finite, read_file

logger = logging.getLogger("tinymim_fast")
HEADS = ("head.", "head_dist.")
SCRATCH = "none"  # instead of a checkpoint: fresh weights


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier to be made of an encoder.

    Args:
        source: the encoder, see `load_encoder`; "none": fresh weights, as MAE and TinyMIM start them.
        model: timm name, where the source can't tell.
        model_kwargs: for `create_vit`.
        key: of several models in the source, the one below this key.
        num_classes: outputs of the new head.
        img_size: side of the square input, pixels; position embeddings are resampled to it.
        global_pool: "avg", the mean over patches and `fc_norm` behind it, or "token", the class token behind `norm`.
        num_heads: other numbers of heads than the source's, one for all blocks or one for each; None: the source's.
        drop_path: rate in the last block; it grows from 0 in the first, linearly with depth.
        head_init_std: of the new head's weights; its biases are 0.
        distilled: a distillation token and a second head for it (DeiT, arXiv 2012.12877).
        pre_head_dim: with it, width of a layer before both heads, as TinyMIM*-T has: see `star`; 0: none.
    """

    source: str
    num_classes: int
    img_size: int
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    global_pool: str = "avg"
    num_heads: int | Sequence[int] | None = None
    drop_path: float = 0.0
    head_init_std: float = 2e-5
    distilled: bool = False
    pre_head_dim: int = 0


def create_classifier(wanted: Classifier) -> tuple[VisionTransformer, ModelInfo]:
    """A classifier with an encoder's weights and a new head, fp32 on the CPU, and what it is.

    Every number of heads is the source's: a weight means something else under another one. Only `num_heads` changes it.

    Raises:
        InputError: the source can't be read or is of another model (argument "source", "model" or "model_kwargs"),
            fresh weights of a model that nothing names, or a model that has no class token to pool ("global_pool"),
            no form with a distillation token ("distilled"), or no such number of heads ("num_heads").
    """
    encoder = None
    if wanted.source == SCRATCH:
        if wanted.model is None:
            raise InputError("got nothing, want the name of a model where the checkpoint is none", argument="model")
        name, kwargs = wanted.model, dict(wanted.model_kwargs)
    else:
        encoder, told = load_encoder(
            wanted.source,
            model=wanted.model,
            model_kwargs=wanted.model_kwargs,
            img_size=wanted.img_size,
            key=wanted.key,
        )
        name, kwargs = told.architecture, {**told.model_kwargs, "num_heads": _short(head_layout(encoder)["num_heads"])}
    pool = wanted.global_pool
    if pool == "token" and not kwargs.get("class_token", True):
        raise InputError(f"got token, and {name} has no class token; want avg", argument="global_pool")
    if wanted.distilled:
        name, pool = _with_distillation_token(name), "token"
    if wanted.pre_head_dim:
        name, kwargs = "tinymim_fast_star", {**_shape_of(name), **kwargs, "pre_head_dim": wanted.pre_head_dim}
    kwargs |= {"img_size": wanted.img_size, "num_classes": wanted.num_classes, "global_pool": pool}
    vit = create_vit(name, **kwargs, drop_path_rate=wanted.drop_path)
    if wanted.num_heads is not None:
        heads = [wanted.num_heads] * len(vit.blocks) if isinstance(wanted.num_heads, int) else list(wanted.num_heads)
        logger.warning("%s: heads changed from %s to %s", wanted.source, head_layout(vit)["num_heads"], heads)
        with flags(model_kwargs="num_heads"):
            set_num_heads(vit, heads)
        kwargs["num_heads"] = _short(heads)
    if encoder is None:
        init_mae_style(vit, pos_embed="learn" if vit.embed_dim % 4 else "sincos")
        if vit.pos_embed is not None:
            vit.pos_embed.requires_grad_(True)
    else:
        load_state(vit, _without_heads(encoder, vit), source=wanted.source, name=name)
    for head in (vit.head, getattr(vit, "head_dist", None)):
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=wanted.head_init_std)
            nn.init.zeros_(head.bias)
    return vit, ModelInfo(name, kwargs, "fine-tuned", head_layout(vit))


def restore_classifier(checkpoint: Path, *, drop_path: float = 0.0) -> tuple[VisionTransformer, ModelInfo]:
    """The classifier of a fine-tuning run that goes on, and what it is.

    Args:
        checkpoint: a folder that the run saved.
        drop_path: see `Classifier`.

    Raises:
        InputError: unreadable, not finite, or of another kind of run; argument "source".
    """
    _, info = read_weights(checkpoint / WEIGHTS)
    if info is None or info.kind != "fine-tuned":
        raise InputError(f"{checkpoint}: is of no fine-tuning run; choose another folder", argument="source")
    vit = create_vit(info.architecture, **info.model_kwargs, drop_path_rate=drop_path)
    restore(vit, checkpoint)
    return vit, info


def load_classifier(
    source: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    key: str | None = None,
) -> tuple[VisionTransformer, ModelInfo]:
    """A whole classifier with its weights, fp32 on the CPU, and what it is; `info.class_names` where its file has them.

    Args:
        source: see `load_encoder`, as the others: a fine-tuned run, its checkpoints and exports, an official fine-tuned
            file of MAE or TinyMIM, timm's own models. Where a run averaged its weights, the average; the weights
            themselves are `CHECKPOINT/model.safetensors`.

    Raises:
        InputError: see `load_encoder`; or the file has no classifier, argument "metric".
    """
    kwargs = dict(model_kwargs or {})
    if source.startswith("timm:") and not source.startswith("timm:local-dir:"):
        config = timm.get_pretrained_cfg(check_name(source.removeprefix("timm:"), "source"))
        kwargs.setdefault("num_classes", config.num_classes if config else 0)
    vit, info = load_encoder(source, model=model, model_kwargs=kwargs, img_size=img_size, key=key, classifier=True)
    if not vit.num_classes:
        raise InputError(
            f"{source} has no classifier, so no accuracy of its own; take the metrics knn or linear, or fine-tune it "
            "first",
            argument="metric",
        )
    return vit, info


def load_teacher(source: str, class_names: Sequence[str], *, model: str | None = None) -> DistillationTeacher:
    """A frozen classifier to learn from, fp32 on the CPU: timm's wrapper of it, which knows its mean and deviation.

    Args:
        source: `timm:NAME`, any model of timm's with its own weights; else see `load_classifier`, or with `model` a
            file of that model's weights.
        class_names: of the student; a teacher that says its own must say the same in the same order.
        model: timm name of the teacher.

    Raises:
        InputError: no such weights, or other classes; argument "source", "model" or "metric".
    """
    told = None
    if source.startswith("timm:") and not source.startswith("timm:local-dir:"):
        try:
            teacher = timm.create_model(check_name(source.removeprefix("timm:"), "source"), pretrained=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{source}: its weights can't be fetched ({error}); give a local file", argument="source"
            ) from error
    elif model is None:
        teacher, info = load_classifier(source)
        told, made = info.class_names, info.expects
        if made is not None:
            teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": made.mean, "std": made.std}
    else:
        path = find_weights(Path(source))
        state = read_file(path).tensors
        teacher = timm.create_model(check_name(model), num_classes=len(class_names))
        try:
            teacher.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        except RuntimeError as error:
            raise InputError(
                f"{path}: not a {model}: {str(error).splitlines()[-1].strip()}", argument="source"
            ) from error
        check_finite(state, path)
    if teacher.num_classes != len(class_names) or (told is not None and told != list(class_names)):
        raise InputError(
            f"{source}: has {teacher.num_classes} classes, and the images have {len(class_names)}, or others; take a "
            "teacher of the same classes in the same order",
            argument="source",
        )
    return DistillationTeacher(teacher).eval().requires_grad_(False)


class Classification(nn.Module):
    """A classifier and its loss.

    `loss = criterion(logits, targets)`; with a teacher, and two heads,
    `loss = (1 - alpha) criterion(logits, targets) + alpha distill(logits_dist, logits_t)`, as DeiT has it, with
    `distill` the cross-entropy to the teacher's first class ("hard") or `tau^2 KL(teacher || student)` of logits over
    `tau` ("soft").

    Args:
        model: the classifier.
        criterion: of logits (B, classes), fp32, and targets.
        alpha: the teacher's share.
        kind: "hard" or "soft".
        tau: temperature of "soft".
    """

    def __init__(
        self,
        model: VisionTransformer,
        criterion: nn.Module,
        *,
        alpha: float = 0.0,
        kind: str = "hard",
        tau: float = 1.0,
    ):
        super().__init__()
        self.model, self.criterion = model, criterion
        self.alpha, self.kind, self.tau = alpha, kind, tau

    def forward(
        self, images: torch.Tensor, targets: torch.Tensor, logits_t: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses by name: "loss", and with a teacher its parts "task_loss" and "distill_loss".

        Args:
            images: (B, 3, S, S).
            targets: (B,) classes, int64, or (B, classes) shares of them.
            logits_t: (B, classes), the teacher's.
        """
        logits = self.model(images)
        if logits_t is None:
            return {"loss": self.criterion(logits.float(), targets)}
        task_loss = self.criterion(logits[0].float(), targets)
        distill_loss = self._distill(logits[1].float(), logits_t.float())
        loss = (1 - self.alpha) * task_loss + self.alpha * distill_loss
        return {"loss": loss, "task_loss": task_loss, "distill_loss": distill_loss}

    def _distill(self, logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        if self.kind == "hard":
            return nn.functional.cross_entropy(logits_s, logits_t.argmax(dim=1))
        log_s, log_t = (torch.log_softmax(logits / self.tau, dim=1) for logits in (logits_s, logits_t))
        return nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * self.tau**2


def freeze_parts(vit: VisionTransformer, *, num_blocks: int = 0, all_but_head: bool = False) -> None:
    """Leave a part of a classifier as it is: no gradient, no drop path, in place.

    Args:
        vit: the classifier.
        num_blocks: the first so many blocks, and what lies before them.
        all_but_head: everything but the heads, for a linear probe.

    Raises:
        InputError: there are no such blocks, argument "num_blocks".
    """
    if num_blocks > len(vit.blocks):
        raise InputError(f"got {num_blocks}, want at most {len(vit.blocks)}, the model's blocks", argument="num_blocks")
    frozen = tuple(f"blocks.{i}." for i in range(len(vit.blocks) if all_but_head else num_blocks))
    later = ("blocks.", "norm.", "fc_norm.", "attn_pool.", *HEADS)
    for name, parameter in vit.named_parameters():
        before = num_blocks > 0 and not name.startswith(later)
        if name.startswith(frozen) or before or (all_but_head and not name.startswith(HEADS)):
            parameter.requires_grad_(False)
    for block in vit.blocks[: len(frozen)]:
        block.drop_path1 = block.drop_path2 = nn.Identity()


def layer_scales(vit: VisionTransformer, layer_decay: float) -> dict[str, float]:
    """Factors on the learning rate by parameter's name: `layer_decay ** (layers above it)`, as timm groups layers.

    The head, and `fc_norm`, have 1, the last block `layer_decay`, and so on down to patches, tokens and position
    embeddings. The final norm before a class token has its last block's, as in timm.

    Args:
        vit: the classifier.
        layer_decay: of each layer, 1 for none.
    """
    names = {parameter: name for name, parameter in vit.named_parameters()}
    groups = param_groups_layer_decay(vit, layer_decay=layer_decay)
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def _short(heads: Sequence[int]) -> int | list[int]:
    """One number where all are equal, as timm has it."""
    return heads[0] if len(set(heads)) == 1 else list(heads)


def _with_distillation_token(name: str) -> str:
    """timm's model of the same shape with a distillation token."""
    bare = name.split(".")[0]
    distilled = (
        bare if "_distilled_" in bare else bare.replace("vit_", "deit_", 1).replace("_patch", "_distilled_patch")
    )
    try:
        with torch.device("meta"):
            fits = isinstance(create_vit(distilled, img_size=224), VisionTransformerDistilled)
    except InputError:
        fits = False
    if not fits:
        raise InputError(
            f"{name}: timm has no model {distilled} with a distillation token; want a ViT-T, S or B of patch 16",
            argument="distilled",
        )
    return distilled


def _shape_of(name: str) -> dict[str, Any]:
    """What timm's name of a DeiT says of its shape."""
    with torch.device("meta"):
        vit = create_vit(name, img_size=224)
    return {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": vit.blocks[0].attn.num_heads}


def _without_heads(encoder: VisionTransformer, vit: VisionTransformer) -> dict[str, torch.Tensor]:
    """The encoder's weights; a distillation token that it lacks starts as `vit` has it, at the class token's place."""
    state = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith(HEADS)}
    if isinstance(vit, VisionTransformerDistilled) and "dist_token" not in state:
        embed = state["pos_embed"]
        state["dist_token"] = vit.dist_token.detach().clone()
        state["pos_embed"] = torch.cat([embed[:, :1], embed[:, :1], embed[:, 1:]], dim=1)
    return state
