"""What a run says of itself: progress bar or log lines, metrics.jsonl, TensorBoard, a picture of the curves."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinymim_fast.data.errors import name_some
from tinymim_fast.files import whole_file, write_text

logger = logging.getLogger("tinymim_fast")
METRICS = "metrics.jsonl"


class Recorder:
    """Writes the records of one run; on other ranks than 0 it does nothing.

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
        _drop_after(self._path, start_step)
        # what the records, cut to the checkpoint by now, name already
        self._named = {path for record in read_metrics(output_dir) for path in record.get("bad_files", ())}
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115
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
        self._file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        shown = {k: f"{v:.4g}" for k, v in numbers.items()}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            logger.info("step %d/%d  %s", record["step"], self._total, "  ".join(f"{k} {v}" for k, v in shown.items()))
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """The files are whole after it."""
        if self._enabled:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run; a line that was cut off in writing is left out."""
    path = output_dir / METRICS
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def plot_curves(output_dir: Path, parts: tuple[str, ...]) -> Path:
    """`curves.png`: the loss with its parts, the learning rate, and the speed, by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(output_dir)
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
