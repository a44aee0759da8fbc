"""The relation loss in other trainers: timm's tasks, and a tap for any module; docs/adapters.md has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinymim_fast.adapters.tapped import Tapped

if TYPE_CHECKING:
    from tinymim_fast.adapters.timm_task import RelationDistillationTask

__all__ = ["RelationDistillationTask", "Tapped"]


def __getattr__(name: str) -> Any:
    """The task, and with it timm, when it is first asked for: `Tapped` needs torch alone."""
    if name == "RelationDistillationTask":
        from tinymim_fast.adapters.timm_task import RelationDistillationTask

        return RelationDistillationTask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
