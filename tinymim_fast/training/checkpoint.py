"""Checkpoints of a run: when, their names, written whole, and which are kept.

    OUTPUT_DIR/checkpoints/
        step_00000020/                   a checkpoint: its name appears when all of it is on the disk
            model.safetensors            fp32 weights in timm's names, and what they are (`ModelInfo`)
            model_ema.safetensors        their average over steps, where the run keeps one
            optimizer.safetensors        AdamW's moments whole, every rank's random states; step and bad files
            SHA256SUMS                   of all, verified when the run goes on from here
        step_00000040/
        tmp_9f86d081_step_00000060/      being written or removed; what a killed run leaves, the next one removes
        aside_step_00000050_2cf24dba/    was called step_00000050 and is no good checkpoint: for a user to look at
        step_backup/                     a user's: neither read nor removed

`models.checkpoints` has the rule of the names, because whoever reads weights finds a run's newest by it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors

from tinymim_fast.config import RunConfig
from tinymim_fast.distributed import World
from tinymim_fast.engine import STATE, Engine, save_state
from tinymim_fast.errors import InputError, NonFiniteLossError
from tinymim_fast.files import differing, free_mib, remove_folder, set_aside, whole_folder, write_checksums
from tinymim_fast.models.checkpoints import EMA_WEIGHTS, latest_checkpoint, list_checkpoints, save_weights
from tinymim_fast.training.ema import Ema
from tinymim_fast.training.task import Task

logger = logging.getLogger("tinymim_fast")
FOLDER = "checkpoints"


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


class Checkpoints:
    """Saves a run, and knows when it was saved last.

    Args:
        config: where, how often, how many are kept.
        world: the ranks.
        task: gives the whole model's weights.
        engine: gives the trained ones and the optimizer's state.
        ema: gives their average; None for none.
        steps_per_epoch: optimizer steps.
        start_step: step that the run goes on from, 0 for a new one.

    Attributes:
        best: name of a checkpoint that is not removed, however old; None for none.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        task: Task,
        engine: Engine,
        ema: Ema | None = None,
        *,
        steps_per_epoch: int,
        start_step: int,
    ):
        self.config, self.world, self.task, self.engine, self.ema = config, world, task, engine, ema
        self.output_dir = Path(config.output_dir)
        self.steps_per_epoch = steps_per_epoch
        self.best: str | None = None
        self._saved_step = start_step or None
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether `step` is one of every `checkpoint_interval`; the same on every rank."""
        interval = self.config.checkpoint_interval
        return bool(interval) and step % interval == 0

    @property
    def overdue(self) -> bool:
        """Whether `checkpoint_minutes` have passed since the last one, by rank 0's clock."""
        minutes = self.config.checkpoint_minutes
        return bool(minutes) and self.world.is_main and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, step: int, client_state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, unless there is one, and remove the oldest. Collective; waits for the device.

        Args:
            step: optimizer steps taken.
            client_state: what a continuation needs besides, as JSON can hold it.

        Raises:
            InputError: it can't be written; the last one is untouched.
            NonFiniteLossError: a weight is not finite.
        """
        self._save(step, client_state, self.world.broadcast)  # an error of rank 0 is everyone's

    def save_alone(self, step: int, client_state: dict[str, Any]) -> None:
        """What `save` does, of rank 0 without the others, which are gone, where the engine `holds_all`.

        Random numbers are not in it: a run that goes on from it draws new ones.
        """
        self._save(step, client_state, None)

    def _save(self, step: int, client_state: dict[str, Any], together: Callable[..., Any] | None) -> None:
        if self._saved_step == step:
            return
        weights = self.task.weights(self.engine.trained_state())
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:
            raise NonFiniteLossError(f"{broken[0]} is not finite after step {step}")
        averaged = None if self.ema is None else self.task.weights(self.ema.state())
        state = self.engine.optimizer_state(alone=together is None)
        info = replace(self.task.info, step=step, epoch=step / self.steps_per_epoch)
        final = self.output_dir / FOLDER / name_of(step)

        def write() -> None:
            if final.exists():  # no checkpoint, or the run would have gone on from it
                set_aside(final)
            with whole_folder(final) as folder:
                save_weights(folder, weights, info)
                if averaged is not None:
                    save_weights(folder, averaged, info, EMA_WEIGHTS)
                save_state(folder, state, {**client_state, "step": step})
                write_checksums(folder)
            prune(self.output_dir, self.config.checkpoint_hist, self.best)

        try:
            together(write) if together else write()
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            # PyTorch reports a full disk as "unexpected pos"
            raise InputError(
                f"{self.output_dir}: the checkpoint of step {step} can't be saved ({free_mib(self.output_dir)} MiB are "
                f"free): {error}; the last good one is {latest_checkpoint(self.output_dir) or 'none'}. "
                "Free space and start the same command again",
                argument="output_dir",
            ) from error
        self._saved_step = step
        self._saved_at = time.monotonic()


def kept(checkpoint: Path) -> dict[str, Any]:
    """`Task.kept` of the run that saved it; nothing where it can't be read or is of before there was one."""
    try:
        with safetensors.safe_open(checkpoint / STATE, framework="np") as file:
            return json.loads(file.metadata()["client_state"]).get("kept") or {}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return {}


def prune(output_dir: Path, keep: int, best: str | None = None) -> None:
    """Remove all checkpoints but the newest `keep` and the `best`; one that can't be removed is a warning."""
    for old in list_checkpoints(output_dir)[:-keep]:
        if old.name == best:
            continue
        try:
            remove_folder(old)
        except OSError as error:
            logger.warning("%s: this old checkpoint can't be removed: %s", old, error)


def damage(folder: Path, *, verify: bool) -> str | None:
    """Why a run can't go on from this checkpoint; None where nothing speaks against it.

    Args:
        folder: one of `list_checkpoints`.
        verify: compare the files with their checksums, which reads all of them; one that was written before there were
            checksums has none.
    """
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    differ = differing(folder) if verify else []
    return f"{', '.join(differ)} is not what was saved: its checksum differs" if differ else None
