"""What modules inside any model give, as the output of a module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


class Tapped(nn.Module):
    """A model of any kind that returns what some of its modules gave: the packed projections `relation_loss` takes.

    Forward hooks, which torch.compile traces with fullgraph. What it returns has the gradient that
    DistributedDataParallel and FSDP2 prepare for; `find_unused_parameters=True` is needed there, as what lies behind
    the tap gets none. The whole model is computed; for timm's vision transformers `tinymim_fast.models.taps.Taps` stops
    at the tap, and gives q and k behind a qk-norm.

    Args:
        model: shared, with hooks from now on.
        *names: of modules in it, as `model.get_submodule` takes them, each giving one tensor (B, N, C_i): a packed
            projection, or those of query, key and value in this order.

    Raises:
        AttributeError: there is no such module.
    """

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model, self.names = model, names
        self._found: dict[str, torch.Tensor] = {}
        self._listens = False  # so that nothing is held on to where the model is used alone
        for name in names:
            model.get_submodule(name).register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._listens:
            self._found[name] = output

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the model on these arguments; gives the tapped tensors side by side, (B, N, sum of C_i)."""
        self._listens = True
        self.model(*args, **kwargs)
        self._listens = False
        found = [self._found.pop(name) for name in self.names]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
