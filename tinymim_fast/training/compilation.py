"""torch.compile of a model's blocks, one by one: names stay, and what can't be compiled runs eagerly.

A whole model would be one graph that DeepSpeed's hooks break; its blocks, alike but for their weights, share one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import get_compilation_metrics

logger = logging.getLogger("tinymim_fast")
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def wanted(choice: bool | str, device: torch.device) -> bool:
    """What `compile` means on this device: "auto" compiles on GPUs only.

    On CPUs compiled blocks were no faster than eager ones in a trial; on GPUs nobody has measured them yet.
    """
    return device.type == "cuda" if choice == "auto" else bool(choice)


class Compiler:
    """Compiles modules, and knows how long that took and what was compiled again. Used as a context, around the run.

    A module is compiled where it is first called; those that are alike share a graph. More graphs than kinds of
    modules, or any after the first step, mean that something of the input or the model changes: that is a warning with
    the reason.
    """

    def __init__(self) -> None:
        self.num_graphs = 0  # compiled so far
        self._kinds: set[str] = set()
        self._seconds, self._began = 0.0, 0.0
        self._num_reported: int | None = None
        self._eager_because: str | None = None

    def __enter__(self) -> Compiler:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def compile(self, modules: Iterable[nn.Module]) -> None:
        """From now on, each module's forward is compiled at its first call; hooks, DeepSpeed's too, stay outside.

        Random numbers are drawn as eager modules draw them. Where the compiler is missing or fails, all modules run
        eagerly from then on, and one line says so.
        """
        for module in modules:
            self._kinds.add(f"{module!r} {module.training} {next(module.parameters()).dtype}")
            module.forward = self._compiled(module.forward)

    def after_step(self) -> float:
        """Seconds that compiling took since the last call; says what was compiled, warns of what was again."""
        seconds, self._seconds = self._seconds, 0.0
        if self._num_reported is None:
            self._num_reported = self.num_graphs
            if self.num_graphs:
                logger.info("compile: %d graphs in %.1f s", self.num_graphs, seconds)
            again = self.num_graphs - len(self._kinds)
        else:
            again, self._num_reported = self.num_graphs - self._num_reported, self.num_graphs
        if again > 0:
            reasons = {metrics.recompile_reason or "unknown" for metrics in get_compilation_metrics()[-again:]}
            logger.warning(
                "compile: %d graphs compiled again, %.1f s: %s", again, seconds, one_line("; ".join(reasons))
            )
        return seconds

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(forward, fullgraph=True, dynamic=False, options={"fallback_random": True})

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._eager_because is None:
                try:
                    # the graph of the backward pass is compiled here too, where eager modules can still take over
                    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                        return compiled(*args, **kwargs)
                except COMPILER_ERRORS as error:
                    self._eager_because = one_line(str(error))
                    logger.warning("compile: %s; going on with eager modules", self._eager_because)
            return forward(*args, **kwargs)

        return run

    def _start(self, _: object) -> None:
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        self._seconds += time.perf_counter() - self._began
        self.num_graphs += 1


def one_line(text: str) -> str:
    """What compilers say, without its advice and line breaks, no longer than a log can bear."""
    return " ".join(text.partition("\n\n")[0].split())[:300]
