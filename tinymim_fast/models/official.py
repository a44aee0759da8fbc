"""What published files of MAE and TinyMIM say of themselves: the model's name in the training program's arguments.

TinyMIM's pre-training differs from timm's models in its numbers of heads, which no weight shows: the last block has the
teacher's, and T and S have 6 before it. Fine-tuning goes back to timm's. (github.com/OliverRensu/TinyMIM,
models_tinymim.py, models_vit.py; its issue 4.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tinymim_fast.errors import InputError

# Heads of each block, by size.
PRETRAINING_HEADS = {"tiny": [6] * 11 + [12], "small": [6] * 11 + [12], "base": [12] * 11 + [16]}
WIDER_LAYER = "conv1x1.1.weight"
CLASSIFIER = ("head.weight", "fc_norm.weight")


@dataclass(frozen=True)
class Published:
    """What a file says of its model.

    Args:
        architecture: timm name.
        kind: "tinymim", "mae" or "fine-tuned".
        model_kwargs: where it differs from timm's model of that name.
        relation_heads: that its last block reproduced; None where it was not distilled.
    """

    architecture: str
    kind: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    relation_heads: int | None = None


def published(args: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Published | None:
    """What the arguments of the program that wrote a file tell of its model; None where they tell nothing.

    Args:
        args: of the training program.
        state: the encoder's weights.
    """
    name = args.get("model")
    if not isinstance(name, str):
        return None
    if match := re.fullmatch(r"tinymim_vit_(tiny|small|base)_patch16", name):
        heads = PRETRAINING_HEADS[match[1]]
        if any(key in state for key in CLASSIFIER):  # fine-tuned under the pre-training's name
            return Published(f"vit_{match[1]}_patch16_224", "fine-tuned")
        return Published(f"vit_{match[1]}_patch16_224", "tinymim", {"num_heads": list(heads)}, heads[-1])
    if match := re.fullmatch(r"mae_vit_(base|large|huge)_(patch1[46])(_dec\w+)?", name):
        return Published(f"vit_{match[1]}_{match[2]}_224", "mae")
    if match := re.fullmatch(r"vit_(tiny|small|base|large|huge)_(patch1[46])", name):
        return Published(f"vit_{match[1]}_{match[2]}_224", "fine-tuned")
    return None


def refuse_star(state: Mapping[str, torch.Tensor], path: object) -> None:
    """Refuse TinyMIM*-T's layout: a distillation token, and a layer of 1280 before the head.

    Raises:
        InputError: argument "source".
    """
    if WIDER_LAYER in state:
        shape = tuple(state[WIDER_LAYER].shape)
        raise InputError(
            f"{path}: has {WIDER_LAYER}, {shape}, the layout of TinyMIM*-T (a distillation token, a wider layer before "
            "the head), which can't be loaded yet; take TinyMIM-T without the star",
            argument="source",
        )


def classifier_kwargs(state: Mapping[str, torch.Tensor], path: object) -> dict[str, Any]:
    """Arguments of a timm model that keeps the file's classifier and pools as it was trained.

    `fc_norm` lies behind the mean over patches, `norm` before the class token is taken.

    Raises:
        InputError: both norms, which no timm model has, or a head that is no matrix; argument "source".
    """
    kwargs: dict[str, Any] = {}
    if "fc_norm.weight" in state:
        if "norm.weight" in state:
            raise InputError(f"{path}: has norm and fc_norm, and timm's models have one of them", argument="source")
        kwargs["global_pool"] = "avg"
    head = state.get("head.weight")
    if head is not None:
        if head.ndim != 2:
            raise InputError(f"{path}: head.weight is {tuple(head.shape)}, want a matrix", argument="source")
        kwargs["num_classes"] = head.shape[0]
    return kwargs
