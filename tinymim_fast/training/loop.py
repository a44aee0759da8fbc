"""The loop that `train.py` and `pretrain.py` share: data in, optimizer steps, metrics and checkpoints out."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import yaml
from torch import nn

from tinymim_fast import engine as engines
from tinymim_fast.batches import BatchPlan
from tinymim_fast.config import RunConfig, differences, parse, to_yaml
from tinymim_fast.data import ImageIndex, build_loader, find_images
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.errors import name_some
from tinymim_fast.data.loader import TrainLoader
from tinymim_fast.data.views import TrainView
from tinymim_fast.distributed import World, seed_rank
from tinymim_fast.engine import Engine
from tinymim_fast.errors import (
    EXIT_INPUT,
    EXIT_NON_FINITE,
    EXIT_TERMINATED,
    InputError,
    NonFiniteLossError,
    Terminated,
    flags,
)
from tinymim_fast.models.checkpoints import ModelInfo, latest_checkpoint, save_weights
from tinymim_fast.training.metrics import Recorder, plot_curves, read_metrics

logger = logging.getLogger("tinymim_fast")
CONFIG = "config.yaml"
INDEX = "index.npz"
SAVE, STOP, TOO_MANY_BAD = 1, 2, 3  # what ranks agree on, the larger winning


@dataclass(frozen=True)
class Task:
    """What a kind of training is.

    Args:
        model: what the engine trains; its forward takes what `prepare` returns and gives losses by name, "loss" among them.
        prepare: from the views of a micro-batch, on the device, to the model's inputs; runs without gradients.
        parts: the losses to report, "loss" first.
        views: of each image, 1 or 2.
        color_jitter: strength, of the second view.
        weights: the whole model's fp32 state in timm's names, from the engine's trained one.
        info: what the weights file says of itself; `step` and `epoch` are filled in.
    """

    model: nn.Module
    prepare: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
    parts: tuple[str, ...]
    views: int
    color_jitter: float
    weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    info: ModelInfo


def main(
    kind: type[RunConfig],
    build_task: Callable[[Any, World, Path | None], Task],
    argv: Sequence[str] | None,
    prog: str,
) -> int:
    """Parse, train, and turn what went wrong into one line and an exit code (see `errors`)."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        config = parse(kind, sys.argv[1:] if argv is None else argv, prog)
        world = engines.start()
        try:
            with flags(**{name: f"--{name.replace('_', '-')}" for name in vars(config)}):
                train(config, world, build_task)
        finally:
            engines.stop()
    except (InputError, NonFiniteLossError, Terminated) as stopped:
        codes = {NonFiniteLossError: EXIT_NON_FINITE, Terminated: EXIT_TERMINATED}
        if rank != "0":
            time.sleep(3)  # rank 0 most likely says the same, and its exit makes the launcher end this process
        print(f"{prog}: {stopped}", file=sys.stderr, flush=True)
        return codes.get(type(stopped), EXIT_INPUT)
    return 0


def train(config: RunConfig, world: World, build_task: Callable[[Any, World, Path | None], Task]) -> None:
    """A whole run, or the rest of one.

    Everything that can be wrong with the input is found before the first file is written.

    Raises:
        InputError: see `errors`.
        NonFiniteLossError: the loss or a weight became NaN or Inf.
        Terminated: SIGTERM; a checkpoint was saved.
    """
    output_dir = Path(config.output_dir)
    micro, accum = config.batch_plan(world.world_size)
    ds_config = engines.deepspeed_config(config, world.world_size)
    checkpoint = world.broadcast(lambda: find_checkpoint(config))
    index = world.broadcast(lambda: _find_images(config, resumed=checkpoint is not None))

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    task = build_task(config, world, checkpoint)
    view = TrainView(
        img_size=config.img_size,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=(task.color_jitter,) * 3 if task.views == 2 else None,
        mean=config.mean,
        std=config.std,
        # half the bytes; the CPU is slower at it
        dtype=torch.float16 if config.bf16 and world.device.type == "cuda" else torch.float32,
    )
    bad_files = BadFiles(index, config.max_bad_files)
    with (
        flags(batches="--train-batch-size"),
        build_loader(
            index,
            view,
            BatchPlan(micro_batch_size=micro, accumulation_steps=accum, world_size=world.world_size),
            loader=config.loader,
            seed=config.seed,
            rank=world.rank,
            device=world.device,
            workers=config.workers,
            bad_files=bad_files,
            dali_kwargs=config.dali_kwargs,
        ) as loader,
    ):
        engine = Engine(task.model, config, world, lr_schedule(config, loader.steps_per_epoch))
        start_step = 0
        seed_rank(config.seed, start_step, world.rank)
        if checkpoint is not None:
            client_state = engine.load(checkpoint)
            start_step = client_state["step"]
            bad_files.recheck(client_state["bad_files"])
            logger.info("continuing from %s", checkpoint)
        world.broadcast(lambda: _prepare_folder(output_dir, config, ds_config, index))
        run = Run(config, world, task, engine, loader, accum, start_step)
        run.loop()


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        InputError: the folder holds another run, or `--resume none` and it holds checkpoints.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output-dir {output_dir}: is a file, want a folder")
    latest = latest_checkpoint(output_dir)
    if config.resume == "none":
        if latest is not None:
            raise InputError(
                f"--output-dir {output_dir}: holds {latest.name}; --resume none wants a folder without checkpoints"
            )
        return None
    saved = output_dir / CONFIG
    if saved.exists():
        changed = differences(yaml.safe_load(saved.read_text()), config)
        if changed:
            raise InputError(
                f"--output-dir {output_dir}: holds a run with another configuration ({'; '.join(changed)}); "
                "choose another folder, or the same configuration to continue it"
            )
    elif latest is not None:
        raise InputError(f"--output-dir {output_dir}: holds checkpoints but no {CONFIG}; choose another folder")
    return latest


def _find_images(config: RunConfig, *, resumed: bool) -> ImageIndex:
    """The images of `--data-path`; a continued run keeps the list and the order that it began with."""
    try:
        index = find_images(config.data_path, split="train", workers=config.workers)
    except InputError as error:
        raise InputError(f"--data-path: {error}") from error
    saved = Path(config.output_dir) / INDEX
    if resumed and saved.exists():
        index = _as_begun(config, ImageIndex.load(saved), index)
    if (bad_files := BadFiles(index, config.max_bad_files)).too_many:
        raise bad_files.error()
    return index


def _as_begun(config: RunConfig, before: ImageIndex, now: ImageIndex) -> ImageIndex:
    """The list that the run began with, where the images are now; those damaged since are found when they are read."""
    same = before.paths == now.paths and np.array_equal(before.sizes, now.sizes)
    if same:
        return now
    if {*before.paths, *before.damaged} != {*now.paths, *now.damaged} or before.shards != now.shards:
        raise InputError(
            f"--data-path {config.data_path}: holds {len(now)} images, not the {len(before)} that this run began with, or "
            "others; restore them, or choose another --output-dir"
        )
    return replace(before, root=now.root)


def _prepare_folder(output_dir: Path, config: RunConfig, ds_config: dict[str, Any], index: ImageIndex) -> None:
    """Folder, resolved configuration, list of images; unfinished checkpoints of a killed run go."""
    try:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        for unfinished in (output_dir / "checkpoints").glob("tmp_*"):
            shutil.rmtree(unfinished)
        _write(output_dir / CONFIG, to_yaml(config))
        _write(output_dir / "deepspeed_config.json", json.dumps(ds_config, indent=2) + "\n")
        index.save(output_dir / INDEX)
    except OSError as error:
        raise InputError(f"--output-dir {output_dir}: can't be written: {error}") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def lr_schedule(config: RunConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate by optimizer step: linear warm-up from 0, then half a cosine to `min_lr` (MAE's, per step)."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    peak, low = config.peak_lr, config.min_lr

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))

    return lr_at


class Run:
    """The steps of one run. One loop, `loop`; the rest is what happens every so many steps."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        task: Task,
        engine: Engine,
        loader: TrainLoader,
        accum: int,
        start_step: int,
    ):
        self.config, self.world, self.task, self.engine = config, world, task, engine
        self.loader, self.bad_files = loader, loader.bad_files
        self.steps_per_epoch, self.accum = loader.steps_per_epoch, accum
        self.step = start_step
        self.total_steps = self.steps_per_epoch * config.epochs
        self.output_dir = Path(config.output_dir)
        self.losses: list[torch.Tensor] = []  # on the device, one (parts,) a step, not looked at yet
        self.seen: list[torch.Tensor] = []  # on the host, (steps, parts), not reported yet
        self.last_saved = start_step if start_step else None
        self.terminate = False

    def loop(self) -> None:
        config, engine, task = self.config, self.engine, self.task
        self.recorder = Recorder(
            self.output_dir,
            total_steps=self.total_steps,
            start_step=self.step,
            tensorboard=config.tensorboard,
            enabled=self.world.is_main,
        )
        # what the records, cut to the checkpoint by now, name already
        records = read_metrics(self.output_dir) if self.world.is_main else []
        self.named = {path for record in records for path in record.get("bad_files", ())}
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        batches = self.loader.batches(self.step, self.total_steps - self.step)
        agreement = None  # on what ranks asked for in the step before
        self._restart_clocks()
        self.saved_at = time.monotonic()
        try:
            while self.step < self.total_steps:
                total, self.lr = 0.0, engine.lr
                for _ in range(self.accum):
                    asked = time.perf_counter()
                    views = next(batches)
                    self.waited += time.perf_counter() - asked
                    with torch.no_grad():
                        inputs = task.prepare(tuple(v.to(engine.dtype) for v in views))
                    losses = engine.forward(*inputs)
                    engine.backward(losses["loss"])
                    engine.step()
                    total = total + torch.stack([losses[p].detach() for p in task.parts])
                self.losses.append(total / self.accum)
                self.step += 1
                self.recorder.advance()

                # Ranks agree a step late, on the host: nobody waits, and all stop or save at the same step.
                request = 0
                if agreement is not None:
                    work, answer = agreement
                    work.wait()
                    request = int(answer)

                # The host waits for the device here, and where it saves, and nowhere else.
                if self.step % config.log_interval == 0 or self.step == self.total_steps or request >= STOP:
                    self._report()
                if request or self._save_due() or self.step == self.total_steps:
                    self._save()
                if request == STOP and self.step < self.total_steps:
                    raise Terminated(f"stopped by SIGTERM at step {self.step}, saved; the same command continues")
                if request == TOO_MANY_BAD:
                    raise self.bad_files.error()
                agreement = self.world.start_max(self._wish())
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.recorder.close()
        if self.world.is_main:
            logger.info("done: %s", latest_checkpoint(self.output_dir))
            plot_curves(self.output_dir, task.parts)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self.terminate = True

    def _wish(self) -> int:
        """What this rank asks all ranks to do at the end of the next step."""
        if self.bad_files.too_many:
            return TOO_MANY_BAD
        if self.terminate:
            return STOP
        minutes = self.config.checkpoint_minutes
        due = minutes and self.world.is_main and time.monotonic() - self.saved_at > 60 * minutes
        return SAVE if due else 0

    def _save_due(self) -> bool:
        interval = self.config.checkpoint_interval
        return bool(interval) and self.step % interval == 0

    def _restart_clocks(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    def _look(self) -> None:
        """Bring the losses that are still on the device to the host, averaged over ranks, and check them on every rank.

        Bad files that one rank found become known to all.
        """
        if not self.losses:
            return
        num_steps = len(self.losses)
        mine = torch.stack(self.losses).float().cpu()
        losses, found = zip(*self.world.gather((mine, self.bad_files.reasons)))
        for reasons in found:
            self.bad_files.update(reasons)
        everyone = torch.stack(losses)  # (ranks, steps, parts)
        bad = ~everyone.isfinite().all(-1)
        if bad.any():
            at = int(bad.any(0).float().argmax())
            ranks = ", ".join(str(int(r)) for r in bad[:, at].nonzero()[:, 0])
            self._fail(f"the loss is not finite at step {self.step - num_steps + at + 1} on rank {ranks}")
        self.seen.append(everyone.mean(0))
        self.losses.clear()

    def _report(self) -> None:
        """One record of the steps since the last one; rank 0 writes it."""
        self._look()
        if not self.seen:
            return
        steps = torch.cat(self.seen)  # (steps, parts)
        elapsed = time.perf_counter() - self.began
        record = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            **dict(zip(self.task.parts, steps.mean(0).tolist(), strict=True)),
            "lr": self.lr,
            "images_per_s": round(len(steps) * self.config.train_batch_size / elapsed, 2),
            "data_wait": round(self.waited / elapsed, 4),
            "time": round(time.time(), 2),
        }
        bad_files = self.bad_files.by_path
        new = {path: reason for path, reason in bad_files.items() if path not in self.named}
        if new and self.world.is_main:
            record |= {"num_bad_files": len(bad_files), "bad_files": new}
            self.named |= new.keys()
            logger.warning("can't be decoded, replaced by others: %s", name_some(f"{p} ({r})" for p, r in new.items()))
        self.recorder.write(record)
        self.seen.clear()
        self._restart_clocks()

    def _fail(self, what: str) -> None:
        last = latest_checkpoint(self.output_dir)
        raise NonFiniteLossError(
            f"{what}; the last good checkpoint is {last or 'none: no checkpoint was saved yet'}. "
            "Lower --lr-base, lengthen --warmup-epochs, or try --bf16 false"
        )

    def _save(self) -> None:
        """A checkpoint under a temporary name, renamed when it is whole; older ones beyond `checkpoint_hist` go."""
        if self.last_saved == self.step:
            return
        began = time.perf_counter()
        self._look()  # a checkpoint after a bad loss would not be a good one
        folder = self.output_dir / "checkpoints"
        weights = self.task.weights(self.engine.trained_state())
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:
            self._fail(f"{broken[0]} is not finite after step {self.step}")
        state = self.engine.optimizer_state()
        info = replace(self.task.info, step=self.step, epoch=self.step / self.steps_per_epoch)
        final, temporary = folder / f"step_{self.step:08d}", folder / f"tmp_step_{self.step:08d}"

        def write() -> None:
            temporary.mkdir()
            save_weights(temporary, weights, info)
            engines.save_state(temporary, state, {"step": self.step, "bad_files": self.bad_files.by_path})
            os.rename(temporary, final)
            for old in sorted(folder.glob("step_*"))[: -self.config.checkpoint_hist]:
                shutil.rmtree(old)

        try:
            self.world.broadcast(write)  # an error of rank 0 is everyone's
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            free_mib = shutil.disk_usage(self.output_dir).free >> 20  # PyTorch reports a full disk as "unexpected pos"
            raise InputError(
                f"--output-dir {self.output_dir}: the checkpoint of step {self.step} can't be saved ({free_mib} MiB are free): "
                f"{error}; the last good one is {latest_checkpoint(self.output_dir) or 'none'}. "
                "Free space and start the same command again"
            ) from error
        self.last_saved = self.step
        self.saved_at = time.monotonic()
        self.began += time.perf_counter() - began  # saving is not training
