"""Distil vision transformers by token relations (TinyMIM, CVPR 2023), fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinymim_fast.version import __version__

if TYPE_CHECKING:
    from tinymim_fast.adapters.tapped import Tapped
    from tinymim_fast.kernels import RelationLoss, relation_kl, relation_loss

__all__ = ["RelationLoss", "Tapped", "__version__", "relation_kl", "relation_loss"]


def __getattr__(name: str) -> Any:
    """The kernels, and with them torch, when they are first asked for."""
    if name == "Tapped":
        from tinymim_fast.adapters.tapped import Tapped

        return Tapped
    if name in __all__:
        from tinymim_fast import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
