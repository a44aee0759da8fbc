"""A whole run, top to bottom: find what is there, build, train, report, save."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinymim_fast.batches import BatchPlan
from tinymim_fast.config import RunConfig, to_yaml
from tinymim_fast.data import ImageIndex, build_loader
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.deepspeed_config import deepspeed_config, refusals
from tinymim_fast.distributed import World, rank_was_lost, seed_rank
from tinymim_fast.engine import Engine
from tinymim_fast.errors import InputError, NonFiniteLossError, Terminated, flags
from tinymim_fast.files import remove_unfinished, set_aside, write_text
from tinymim_fast.models.checkpoints import EMA_WEIGHTS, latest_checkpoint, list_checkpoints, read_weights
from tinymim_fast.training import checkpoint as checkpoints
from tinymim_fast.training import resume
from tinymim_fast.training.agreement import SAVE, STOP, TOO_MANY_BAD, UNDONE, Agreement, StepStart
from tinymim_fast.training.compilation import Compiler, wanted
from tinymim_fast.training.cuda_graphs import capture_frozen
from tinymim_fast.training.ema import Ema
from tinymim_fast.training.lock import RunLock
from tinymim_fast.training.metrics import Recorder, plot_curves, warn_of_divergence
from tinymim_fast.training.peers import Peers
from tinymim_fast.training.progress import Progress
from tinymim_fast.training.schedule import lr_schedule
from tinymim_fast.training.step import TrainStep
from tinymim_fast.training.stop import TRAINING, StopRequests, reason_of
from tinymim_fast.training.task import Task, Views
from tinymim_fast.training.tracing import Tracer
from tinymim_fast.training.validation import Validator

logger = logging.getLogger("tinymim_fast")
DS_CONFIG = "deepspeed_config.json"


def train(
    config: RunConfig,
    world: World,
    build_task: Callable[[Any, World, Path | None, ImageIndex], Task],
    stop: StopRequests | None = None,
) -> None:
    """A whole run, or the rest of one.

    Everything that can be wrong with the input is found before the first file is written.

    Args:
        config: what to train, on what, and where to.
        world: from `engine.start`.
        build_task: makes the task of (config, world, checkpoint to take the weights from or None, images to train on);
            see tasks/.
        stop: takes this process's signals; None: only `max_time` stops the run.

    Raises:
        InputError: a folder, file or setting that can't be used; its argument is the field's name.
        NonFiniteLossError: the loss or a weight became NaN or Inf.
        Terminated: a signal, or `max_time` is over; a checkpoint was saved.
    """
    stop = stop or StopRequests()
    stop.peers = Peers(world, stop.state, same=TRAINING)

    # What is there: worked out once, on rank 0 where files are read.
    output_dir = Path(config.output_dir)
    batches = config.batch_plan(world.world_size)
    ds_config = deepspeed_config(
        batches,
        zero_stage=config.zero_stage,
        bf16=config.bf16,
        clip_grad=config.clip_grad,
        skip_nonfinite=config.on_nonfinite == "skip",
        deepspeed_config=config.deepspeed_config,
    )
    lock = RunLock(output_dir)

    def find_checkpoint() -> resume.Found:
        lock.acquire()  # in a new folder later, when all input was found good
        return resume.find_checkpoint(config)

    found = world.broadcast(find_checkpoint)
    checkpoint = found.checkpoint
    index = world.broadcast(lambda: resume.find_run_images(config, resumed=checkpoint is not None))
    bad_files = BadFiles(index, config.max_bad_files)

    # What is trained: the same initial weights on every rank, then random numbers of each rank's own.
    torch.manual_seed(config.seed)
    task = build_task(config, world, checkpoint, index)
    with flags(batches="train_batch_size"):
        loader = build_loader(
            index,
            task.view,
            batches,
            loader=config.loader,
            seed=config.seed,
            rank=world.rank,
            device=world.device,
            workers=config.workers,
            bad_files=bad_files,
            dali_kwargs=config.dali_kwargs,
            waiting=stop.look_while_waiting,
        )
    with loader, Compiler() as compiler:
        steps_per_epoch = loader.steps_per_epoch
        regions = task.regions if wanted(config.compile, world.device) else ()
        compiler.compile(regions)
        shape = (batches.micro_batch_size, 3, config.img_size, config.img_size)
        capture_frozen(config.cuda_graphs, task.frozen, world.device, shape)
        with refusals(config.deepspeed_config):
            engine = Engine(
                task.model,
                ds_config,
                world,
                lr_at=lr_schedule(config, steps_per_epoch),
                weight_decay=config.weight_decay,
                opt_betas=config.opt_betas,
                lr_scale=task.lr_scale,
                no_weight_decay=task.no_weight_decay,
                seed=config.seed,
                streams=task.streams,
                regions=regions,
            )
        ema = None if task.ema_decay is None else Ema(engine, decay=task.ema_decay, warmup=task.ema_warmup)
        step, total_steps, num_skipped, client_state = 0, steps_per_epoch * config.epochs, 0, {}
        seed_rank(config.seed, step, world.rank)
        if checkpoint is not None:
            client_state = engine.load(checkpoint)
            if ema is not None:
                ema.load(task.trained(read_weights(checkpoint / EMA_WEIGHTS)[0]))
            step, num_skipped = client_state["step"], client_state.get("num_skipped", 0)
            resume.check_kept(task.kept, client_state.get("kept"))
            bad_files.recheck(client_state["bad_files"])
            logger.info("continuing from %s", checkpoint)
        world.broadcast(lambda: _prepare_folder(lock, config, engine.ds_config, index, found.damaged))

        # The run.
        train_step = TrainStep(
            engine,
            task.prepare,
            parts=task.parts,
            accumulation_steps=batches.accumulation_steps,
            augment=task.augment,
            start_step=step,
        )
        progress = Progress(
            world,
            task.parts,
            batches,
            steps_per_epoch=steps_per_epoch,
            bad_files=bad_files,
            start_step=step,
            num_skipped=num_skipped,
        )
        saver = checkpoints.Checkpoints(
            config, world, task, engine, ema, steps_per_epoch=steps_per_epoch, start_step=step
        )
        validator = Validator(
            output_dir,
            world,
            task,
            engine,
            ema,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            state=client_state.get("validation"),
        )
        recorder = Recorder(
            output_dir,
            total_steps=total_steps,
            start_step=step,
            tensorboard=config.tensorboard,
            enabled=world.is_main,
        )
        tracer = Tracer(output_dir, config.profile if world.is_main else 0)

        def ask() -> int:
            wanted = STOP + stop.code if stop.code else SAVE if saver.overdue else 0
            return UNDONE + STOP + stop.code if stop.late_s else TOO_MANY_BAD if bad_files.too_many else wanted

        def report() -> None:
            record = progress.record()
            if validator.due(step) and agreement.request <= STOP:
                with progress.paused(), stop.doing("validating"):
                    record = {**record, **validator.measure(step, stop)}
            if record is not None:
                recorder.write({**record, **recorder.new_bad_files(bad_files.by_path)})

        def save(how: Callable[[int, dict[str, Any]], None]) -> None:
            kept = {
                "bad_files": bad_files.by_path,
                "kept": task.kept,
                "num_skipped": progress.num_skipped,
                "validation": validator.state,
            }
            saver.best = validator.best
            how(step, kept)
            validator.write_best()
            stop.last_checkpoint = checkpoints.name_of(step)

        agreement, step_start = Agreement(world, ask), StepStart(task.model, world.device)
        micro_batches = progress.timed(
            loader.batches(step, total_steps - step), stop, partial(_blank, task, batches, world.device)
        )
        stop.last_checkpoint = str(checkpoint or "none")
        if not engine.holds_all:
            stop.divided = f"; ZeRO-{config.zero_stage} divides the optimizer among ranks, so none can save alone"
        stop.start_training(config.max_time, config.max_wait)
        try:
            if validator.due(step):  # a signal broke it off
                with progress.paused(), stop.doing("validating"):
                    measured = validator.measure(step, stop)
                if not measured:
                    raise Terminated(
                        f"stopped by {reason_of(validator.stop_code)} at step {step}, saved; the same command continues"
                    )
                recorder.write({"step": step, "epoch": round(step / steps_per_epoch, 4), **measured})
                validator.write_best()
            while step < total_steps:
                lr = engine.lr
                step_start.keep(step)
                with task.watch(step + 1) as watched:  # all queued: the host runs ahead of the device
                    losses = train_step(micro_batches, agreement.start, agreement.may_update)
                stop.now(TRAINING)
                if agreement.is_undone:  # a rank waits for images in vain: all are where the step before left them
                    step_start.restore(step)
                    if not step:
                        raise stop.terminated_at_start()
                    with stop.doing("saving"):
                        report()
                        save(saver.save)
                        late = {rank: s for rank, s in enumerate(world.gather(stop.late_s)) if s}
                    ranks = ", ".join(f"rank {rank} for {s:.0f} s" for rank, s in late.items())
                    raise Terminated(
                        f"stopped by {reason_of(agreement.request - STOP)} while data was waited for ({ranks}) at step "
                        f"{step}, saved; the same command continues"
                    )
                progress.add(losses, lr, watched)
                step += 1
                if ema is not None and engine.step_applied:
                    ema.update(step)
                if not engine.step_applied:  # on no rank; with on_nonfinite "skip" alone
                    progress.skip()
                    if progress.num_skipped > config.max_nonfinite:
                        raise NonFiniteLossError(
                            f"the gradient is not finite at step {step}, and max_nonfinite, {config.max_nonfinite}, "
                            "were skipped before"
                        )
                recorder.advance()
                progress.leave_out(compiler.after_step())
                with progress.paused():
                    tracer.after_step()
                last = step == total_steps

                # SYNC, device: the losses come to the host here, and where it validates or saves, and nowhere else.
                request = agreement.request  # the same on all ranks, which so stop or save at the same step
                if step % config.log_interval == 0 or last or request > STOP or validator.due(step):
                    report()
                request = max(request, STOP + validator.stop_code if validator.stop_code else 0)
                if request or saver.due(step) or last or validator.is_best(step):
                    with progress.paused(), stop.doing("saving"):
                        progress.look()  # a checkpoint after a bad loss would not be a good one
                        save(saver.save)
                if request == TOO_MANY_BAD:
                    raise bad_files.error()
                if request > STOP and (not last or validator.due(step)):
                    why = reason_of(request - STOP)
                    raise Terminated(f"stopped by {why} at step {step}, saved; the same command continues")
        except NonFiniteLossError as error:
            good = latest_checkpoint(output_dir) or "none: no checkpoint was saved yet"
            raise NonFiniteLossError(
                f"{error}; the last good checkpoint is {good}. "
                "Lower lr_base, lengthen warmup_epochs, or try bf16: false"
            ) from error
        except RuntimeError as error:
            if step and world.is_main and engine.holds_all and rank_was_lost(error):
                step_start.restore(step)
                save(saver.save_alone)
            raise
        finally:
            tracer.close()
            recorder.close()
            lock.release()
    if world.is_main:
        logger.info("done: %s", latest_checkpoint(output_dir))
        validator.log_best()
        warn_of_divergence(output_dir)
        try:
            plot_curves(output_dir, task.parts)
        except OSError as error:
            logger.warning("%s: the picture of the curves can't be written: %s", output_dir, error)


def _blank(task: Task, batches: BatchPlan, device: torch.device) -> Views:
    """In place of a micro-batch that doesn't come."""
    view = task.view
    shapes = ((batches.micro_batch_size, 3, size, size) for size in view.sizes)
    labels = (torch.zeros(batches.micro_batch_size, dtype=torch.int64, device=device),) * view.labels
    return (*(torch.zeros(shape, dtype=view.dtype, device=device) for shape in shapes), *labels)


def _prepare_folder(
    lock: RunLock, config: RunConfig, ds_config: dict[str, Any], index: ImageIndex, damaged: Sequence[Path]
) -> None:
    """Folder, configuration, list of images; what a killed run left unfinished goes, damaged checkpoints aside."""
    output_dir = Path(config.output_dir)
    try:
        (output_dir / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
        was_new = not lock.is_held
        lock.acquire()
        if was_new and list_checkpoints(output_dir):  # looked for before it was this run's
            raise InputError(
                f"{output_dir}: another run has trained here meanwhile; the same command continues it, or choose "
                "another folder",
                argument="output_dir",
            )
        for folder in (output_dir, output_dir / checkpoints.FOLDER):
            remove_unfinished(folder)
        for checkpoint in damaged:
            set_aside(checkpoint)
        for name in (resume.CONFIG, DS_CONFIG, resume.INDEX):
            if (output_dir / name).is_dir():
                set_aside(output_dir / name)
        write_text(output_dir / resume.CONFIG, to_yaml(config))
        write_text(output_dir / DS_CONFIG, json.dumps(ds_config, indent=2) + "\n")
        index.save(output_dir / resume.INDEX)
    except OSError as error:
        raise InputError(f"{output_dir} can't be written: {error}", argument="output_dir") from error
