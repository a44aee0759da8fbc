"""A model with the classifier that its file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import check_name
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.model_info import ModelInfo


def load_classifier(
    source: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> tuple[VisionTransformer, ModelInfo]:
    """`load_encoder` of a model whose classifier and final norm are in the file too.

    Args:
        source: see `load_encoder`, as `model`, `model_kwargs` and `key`.

    Raises:
        InputError: see `load_encoder`; or the file has no classifier, argument "metric".
    """
    kwargs = dict(model_kwargs or {})
    if source.startswith("timm:") and not source.startswith("timm:local-dir:"):
        config = timm.get_pretrained_cfg(check_name(source.removeprefix("timm:"), "source"))
        kwargs.setdefault("num_classes", config.num_classes if config else 0)
    vit, info = load_encoder(source, model=model, model_kwargs=kwargs, key=key, whole=True)
    if not vit.num_classes:
        raise InputError(
            f"{source} has no classifier, so no accuracy of its own; take the metrics knn or linear, or fine-tune it "
            "first",
            argument="metric",
        )
    return vit, info
