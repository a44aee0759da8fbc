"""AdamW's groups: which weights decay, and how fast each one learns."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    lr_scale: Mapping[nn.Parameter, float] | None = None,
    no_weight_decay: Container[nn.Parameter] = frozenset(),
) -> list[dict[str, Any]]:
    """AdamW groups: no decay on 1-D parameters (biases, norms, LayerScale), as in MAE and TinyMIM.

    Args:
        parameters: those that require no gradient are left out.
        weight_decay: of the others.
        lr_scale: factors on the learning rate, 1 where there is none; "lr_scale" of a group, as in timm.
        no_weight_decay: a set of others that are not decayed.
    """
    by_scale: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            scale = 1.0 if lr_scale is None else lr_scale.get(parameter, 1.0)
            decay, no_decay = by_scale.setdefault(scale, ([], []))
            decays = parameter.ndim > 1 and parameter not in no_weight_decay
            (decay if decays else no_decay).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for scale, of_scale in by_scale.items()
        for members, decay in zip(of_scale, (weight_decay, 0.0), strict=True)
        if members
    ]
