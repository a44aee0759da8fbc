"""An average of the weights over steps, of the fp32 master weights, each rank's part where they lie."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import nn

from tinymim_fast.engine import Engine


class Ema:
    """timm's `ModelEmaV3` over an engine's master weights: `ema <- decay ema + (1 - decay) weights` after each step.

    Under ZeRO a rank averages the parts that it updates, without communication; only `state` gathers.

    Args:
        engine: whose weights.
        decay: of each step.
        warmup: let the decay grow: see `ModelEmaV3`.
    """

    def __init__(self, engine: Engine, *, decay: float, warmup: bool = False):
        self._engine = engine
        self._masters = nn.ParameterList(nn.Parameter(m.detach(), requires_grad=False) for m in engine.masters)
        self._ema = ModelEmaV3(self._masters, decay=decay, use_warmup=warmup)

    def update(self, step: int) -> None:
        """Take in the weights after `step` optimizer steps; no host waits."""
        self._ema.update(self._masters, step)

    def state(self) -> dict[str, torch.Tensor]:
        """The average of each trained weight, whole, fp32, on the CPU. Collective."""
        return self._engine.trained_state(list(self._ema.module))

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave. Collective."""
        self._engine.scatter(state, list(self._ema.module))
