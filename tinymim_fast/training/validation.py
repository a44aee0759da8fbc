"""Validation between epochs, and which checkpoint is the best."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tinymim_fast.distributed import World
from tinymim_fast.engine import Engine
from tinymim_fast.files import write_text
from tinymim_fast.training.checkpoint import FOLDER, name_of
from tinymim_fast.training.ema import Ema
from tinymim_fast.training.stop import StopRequests
from tinymim_fast.training.task import Task

logger = logging.getLogger("tinymim_fast")
BEST = "best.json"


class Validator:
    """Measures the weights, and their average where there is one, every few epochs; knows the best so far.

    Args:
        output_dir: of the run, for `best.json`.
        world: the ranks.
        task: what is trained, and its `validation`.
        engine: gives the trained weights.
        ema: gives their average; None for none.
        steps_per_epoch: optimizer steps.
        total_steps: of the whole run; the last one is validated too.
        state: what `state` said where this run was saved; None for a new run.

    Attributes:
        stop_code: of the ranks' `StopRequests`, where they broke the last measurement off; else 0.
    """

    def __init__(
        self,
        output_dir: Path,
        world: World,
        task: Task,
        engine: Engine,
        ema: Ema | None,
        *,
        steps_per_epoch: int,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ):
        self._output_dir, self._world, self._task, self._engine, self._ema = output_dir, world, task, engine, ema
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._validation = task.validation
        self._best: dict[str, Any] | None = (state or {}).get("best")
        self._last_step: int = (state or {}).get("step", 0)
        self.stop_code = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a continued run needs, as JSON can hold it."""
        return {"best": self._best, "step": self._last_step}

    @property
    def best(self) -> str | None:
        """Name of the best checkpoint; None before there is one."""
        return None if self._best is None else Path(self._best["checkpoint"]).name

    def due(self, step: int) -> bool:
        """Whether to measure after `step` steps, which was not done yet; the same on every rank."""
        if self._validation is None or step == 0 or step == self._last_step:
            return False
        return step == self._total_steps or step % (self._validation.interval * self._steps_per_epoch) == 0

    def measure(self, step: int, stop: StopRequests) -> dict[str, float]:
        """Numbers by name, with "_ema" behind those of the average; empty where a signal broke it off. Collective.

        Args:
            step: optimizer steps taken.
            stop: a request to stop breaks it off.
        """
        found = {}
        states = {"": self._engine.trained_state()} | ({"_ema": self._ema.state()} if self._ema else {})
        for suffix, trained in states.items():
            measured = self._validation.measure(self._task.weights(trained), lambda: stop.code != 0)
            found |= {name + suffix: value for name, value in measured.items()}
        self.stop_code = max(self._world.gather(stop.code))
        if self.stop_code:
            return {}
        self._last_step = step
        metric = self._validation.metric + suffix
        if self._best is None or found[metric] > self._best[metric]:
            epoch = round(step / self._steps_per_epoch, 4)
            self._best = {"checkpoint": f"{FOLDER}/{name_of(step)}", "epoch": epoch, metric: found[metric]}
        return found

    def is_best(self, step: int) -> bool:
        """Whether the best was measured after `step` steps."""
        return self.best == name_of(step)

    def write_best(self) -> None:
        """Write `best.json`, which names the best checkpoint; on rank 0, after it was saved."""
        if self._best is None or not self._world.is_main:
            return
        try:
            write_text(self._output_dir / BEST, json.dumps(self._best) + "\n")
        except OSError as error:
            logger.warning("%s: %s can't be written, training goes on: %s", self._output_dir, BEST, error)

    def log_best(self) -> None:
        """Say which checkpoint is the best, and how good it is."""
        if self._best is not None:
            told = ", ".join(f"{k} {v:.4g}" for k, v in self._best.items() if k != "checkpoint")
            logger.info("best: %s (%s)", self._output_dir / self._best["checkpoint"], told)
