"""What a run says of itself: progress bar or log lines, metrics.jsonl, TensorBoard, a picture of the curves."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinymim_fast.data.errors import name_some
from tinymim_fast.files import set_aside, whole_file, write_text

logger = logging.getLogger("tinymim_fast")
METRICS = "metrics.jsonl"
DIVERGED = 2.0  # times its first loss is where a run has not learnt


class Recorder:
    """Writes the records of one run; on other ranks than 0 it does nothing.

    A record that can't be written is a warning: no run ends for it.

    Args:
        output_dir: the run's folder.
        total_steps: optimizer steps of the whole run.
        start_step: step to go on from; records after it, of a run that was cut off, are dropped.
        tensorboard: write event files.
        enabled: False on other ranks than 0.
    """

    def __init__(self, output_dir: Path, *, total_steps: int, start_step: int, tensorboard: bool, enabled: bool):
        self._enabled = enabled
        self._writer = None
        self._named: set[str] = set()
        if not enabled:
            return
        self._path = output_dir / METRICS
        self._failed = False  # the last record couldn't be written
        try:
            _drop_after(self._path, start_step)
        except OSError as error:
            logger.warning("%s can't be cut to step %d: %s", self._path, start_step, error)
        # what the records, cut to the checkpoint by now, name already
        self._named = {path for record in read_metrics(output_dir) for path in record.get("bad_files", ())}
        self._total = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)

    def advance(self) -> None:
        """One optimizer step was queued."""
        if self._enabled:
            self._bar.update()

    def new_bad_files(self, bad_files: Mapping[str, str]) -> dict[str, Any]:
        """What a record says of bad files: how many, and those that no record has named; said in the log too.

        Args:
            bad_files: all that are known by now, reason by name.
        """
        new = {path: reason for path, reason in bad_files.items() if path not in self._named}
        if not new or not self._enabled:
            return {}
        self._named |= new.keys()
        logger.warning("can't be decoded, replaced by others: %s", name_some(f"{p} ({r})" for p, r in new.items()))
        return {"num_bad_files": len(bad_files), "bad_files": new}

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics; `record` has "step", numbers, and what only the file keeps."""
        if not self._enabled:
            return
        self._append(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        shown = {k: f"{v:.4g}" for k, v in numbers.items()}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            logger.info("step %d/%d  %s", record["step"], self._total, "  ".join(f"{k} {v}" for k, v in shown.items()))
        if self._writer is not None:
            heads = {
                f"head_kl/{name}/{number:02d}": value
                for name, values in record.get("head_kl", {}).items()
                for number, value in enumerate(values, start=1)
            }
            for key, value in {**numbers, **heads}.items():
                self._writer.add_scalar(key, value, record["step"])

    def _append(self, line: str) -> None:
        """Opened anew each time: the file or its folder may have been removed, the disk may have been full."""
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("\n" + line if self._failed else line)  # what was written by half ends here
                file.flush()
                os.fsync(file.fileno())
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("%s: records can't be written, training goes on: %s", self._path, error)
            self._failed = True

    def close(self) -> None:
        """The files are whole after it."""
        if self._enabled:
            self._bar.close()
            if self._writer is not None:
                self._writer.close()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run; a line that is none, because it was cut off in writing or damaged, is left out."""
    path = output_dir / METRICS
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    if path.is_dir():
        set_aside(path)
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def warn_of_divergence(output_dir: Path) -> None:
    """Say so where the last record's loss is more than twice the first's."""
    told = [record["loss"] for record in read_metrics(output_dir) if isinstance(record.get("loss"), float)]
    if told and told[-1] > DIVERGED * told[0]:
        logger.warning(
            "the loss ends at %.4g, far above the %.4g that it began with: the run diverged; lower lr_base, lengthen "
            "warmup_epochs, or set clip_grad",
            told[-1],
            told[0],
        )


def plot_curves(output_dir: Path, parts: tuple[str, ...]) -> Path:
    """`curves.png`: the loss with its parts, the learning rate, and the speed, by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = (*parts, "lr", "images_per_s")
    records = [r for r in read_metrics(output_dir) if all(isinstance(r.get(name), int | float) for name in names)]
    steps = [r["step"] for r in records]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    loss, lr, speed = (
        figure.add_subplot(grid[0, :]),
        figure.add_subplot(grid[1, 0]),
        figure.add_subplot(grid[1, 1]),
    )
    for part in parts:
        loss.plot(steps, [r[part] for r in records], label=part, linewidth=1.8 if part == "loss" else 1.1)
    loss.set(ylabel="loss", xlabel="optimizer step")
    if all(r[p] > 0 for r in records for p in parts):
        loss.set_yscale("log")
    if len(parts) > 1:
        loss.legend(frameon=False)
    lr.plot(steps, [r["lr"] for r in records], color="tab:green")
    lr.set(ylabel="learning rate", xlabel="optimizer step")
    speed.plot(steps, [r["images_per_s"] for r in records], color="tab:red")
    speed.set(ylabel="images/s", xlabel="optimizer step", ylim=(0, None))
    for axes in (loss, lr, speed):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / "curves.png"
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
