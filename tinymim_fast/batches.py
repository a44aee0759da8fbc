"""How a global batch is divided: among ranks, and into the micro-batches that one rank takes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One global batch, `accumulation_steps` micro-batches on each of `world_size` ranks.

    Args:
        micro_batch_size: images per forward pass on one rank.
        accumulation_steps: forward passes per optimizer step.
        world_size: ranks.
    """

    micro_batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size
