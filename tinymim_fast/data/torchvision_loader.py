"""The fallback loader: PIL and torchvision in worker processes, applying the parameters of a plan."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.decode import one_line
from tinymim_fast.data.draws import ViewDraws
from tinymim_fast.data.errors import DataError, ImageError
from tinymim_fast.data.plan import EvalPlan, TrainPlan
from tinymim_fast.data.threads import Readers

log = logging.getLogger(__name__)

_WORKER_DEATH = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
_LOST_TENSORS = (ConnectionError, EOFError, FileNotFoundError)  # what it had sent can't be fetched from it any more
_MAX_DEATHS = 3  # in a row, before a batch comes out
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)  # indexed by BRIGHTNESS, CONTRAST, SATURATION


class _TrainBatches(Dataset):
    """Micro-batch number -> views, uint8 (B, 3, S, S), labels where wanted, on the CPU, and what is bad by now."""

    def __init__(self, plan: TrainPlan, bad_files: BadFiles):
        self.plan, self.bad_files = plan, bad_files  # a worker has its own copy of the ledger

    def __getitem__(self, number: int) -> tuple[tuple[torch.Tensor, ...], dict[int, str]]:
        plan, view, sizes, samples = self.plan, self.plan.view, self.plan.view.sizes, []
        read_ids, params = self._whose(number)
        for i in range(len(read_ids)):
            while (image := self._read(int(read_ids[i]))) is None:
                read_ids, params = self._whose(number)  # only the i-th are others
            box = (int(params.top[i]), int(params.left[i]), int(params.height[i]), int(params.width[i]))
            how = params.flip[i], view.interpolation
            by_size = {size: _crop(image, box, size, *how) for size in dict.fromkeys(sizes)}
            views, image = [by_size[sizes[0]]], by_size[sizes[-1]]
            if view.is_jittered:
                for operation in params.jitter_order[i]:
                    image = _JITTER[operation](image, float(params.jitter[i, operation]))
            elif view.is_changed:
                image = plan.rand_augment.apply(image, params.operations[i], params.arguments[i])
            views.append(image)
            samples.append([F.pil_to_tensor(picture) for picture in views[-view.num_views :]])
        batch = [torch.stack(pictures) for pictures in zip(*samples)]
        if view.labels:
            batch.append(torch.from_numpy(plan.labels(read_ids)))
        return tuple(batch), dict(self.bad_files.reasons)

    def _whose(self, number: int) -> tuple[np.ndarray, ViewDraws]:
        read_ids = self.plan.read_ids(number, self.bad_files)
        return read_ids, self.plan.params(number, read_ids)

    def _read(self, sample_id: int) -> Image.Image | None:
        try:
            return self.plan.index.read_image(sample_id)
        except ImageError as error:
            self.bad_files.add(sample_id, error.reason)
            return None


def _crop(image: Image.Image, box: tuple[int, int, int, int], size: int, flip: bool, how: str) -> Image.Image:
    image = F.resized_crop(image, *box, [size, size], interpolation=F.InterpolationMode(how))
    return F.hflip(image) if flip else image


class _EvalBatches(Dataset):
    """Batch number -> one uint8 tensor (B, 3, S, S), on the CPU, and nothing bad."""

    def __init__(self, plan: EvalPlan):
        self.plan = plan

    def __getitem__(self, number: int) -> tuple[tuple[torch.Tensor], dict[int, str]]:
        plan, size, images = self.plan, self.plan.view.img_size, []
        sample_ids = plan.sample_ids(number)
        params = plan.params(number, sample_ids)
        for i, sample_id in enumerate(sample_ids):
            image: Image.Image = plan.index.read_image(sample_id)
            if params.part_height[i] < image.height or params.part_width[i] < image.width:
                part = (params.part_top[i], params.part_left[i], params.part_height[i], params.part_width[i])
                image = F.crop(image, *map(int, part))
            resized = [int(params.height[i]), int(params.width[i])]
            image = F.resize(image, resized, interpolation=F.InterpolationMode(plan.view.interpolation))
            image = F.crop(image, int(params.top[i]), int(params.left[i]), size, size)
            images.append(F.pil_to_tensor(image))
        return (torch.stack(images),), {}


def batches(
    plan: TrainPlan | EvalPlan,
    bad_files: BadFiles,
    numbers: Sequence[int],
    *,
    workers: int,
    **options,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views (B, 3, S, S) and labels, if any, on `device` for each batch number; `workers` processes, 0 for none.

    Workers that are killed from outside are replaced; what they had begun is made again.

    Args:
        plan: the batches.
        bad_files: the ledger.
        numbers: of the batches wanted.
        workers: processes.
        options: `device`, `prefetch` of each worker, `waiting`: see `build_loader`.

    Raises:
        DataError: a file can't be decoded in evaluation, or hardly any in training; names it. Or workers are killed
            each time.
    """
    done, deaths = 0, 0
    while done < len(numbers):
        try:
            with closing(_batches(plan, bad_files, numbers[done:], workers=workers, **options)) as running:
                for views in running:
                    yield views
                    done, deaths = done + 1, 0
        except (RuntimeError, *_LOST_TENSORS) as error:
            if isinstance(error, RuntimeError) and not _WORKER_DEATH.search(str(error)):
                raise
            deaths += 1
            if deaths == _MAX_DEATHS:
                raise DataError(
                    f"got {workers}, of which some were killed {deaths} times in a row, for want of memory most "
                    "likely; try fewer, or a smaller batch",
                    argument="workers",
                ) from None
            log.warning(
                "a data worker was killed, for want of memory most likely; starting them anew (%s)", one_line(error)
            )


def _batches(
    plan: TrainPlan | EvalPlan,
    bad_files: BadFiles,
    numbers: Sequence[int],
    *,
    device: torch.device,
    workers: int,
    prefetch: int,
    waiting: Callable[[], None],
) -> Iterator[tuple[torch.Tensor, ...]]:
    is_train = isinstance(plan, TrainPlan)
    on_child = signal.getsignal(signal.SIGCHLD)
    loader = iter(
        DataLoader(
            _TrainBatches(plan, bad_files) if is_train else _EvalBatches(plan),
            batch_size=None,  # one item is one batch
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            prefetch_factor=prefetch if min(workers, len(numbers)) else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=partial(_end_with_parent, os.getpid()),
            generator=torch.Generator(),  # else it draws a seed from the global generator, which resuming must not
        )
    )
    # torch's handler raises wherever the training is when a worker dies; its queue tells too, in five seconds
    if threading.current_thread() is threading.main_thread() and on_child is not None:
        signal.signal(signal.SIGCHLD, on_child)
    affine = [_scale_and_shift(mean, std, device) for mean, std in plan.view.normalisations]
    reader = Readers(1, waiting)  # a worker that hangs, or is stopped, may keep the loader itself from answering
    try:
        while (batch := reader.result(reader.submit(next, loader, None))) is not None:
            parts, bad = batch  # pictures as uint8, a quarter of the bytes for workers to send
            if is_train:
                bad_files.update(bad)
            parts = [part.to(device, non_blocking=True) for part in parts]
            views = (torch.addcmul(shift, view, scale) for view, (scale, shift) in zip(parts, affine))
            yield (*(view.to(plan.view.dtype) for view in views), *parts[len(affine) :])
    except DataError as error:  # a worker's comes with its traceback in front
        raise DataError(re.split(r"\b(?:Data|Image)Error: ", str(error.args[0]))[-1].strip()) from None
    finally:
        if hasattr(loader, "_shutdown_workers"):  # now, not when the last traceback that holds it is dropped
            if not reader.is_late:
                loader._shutdown_workers()
            for worker in loader._workers:  # one that hangs in a read takes no other signal
                worker.kill()
        reader.close()


def _scale_and_shift(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b, (3, 1, 1), of a x + b, which normalises x of 0..255."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    return scale, torch.tensor([-m / s for m, s in zip(mean, std)], device=device).view(3, 1, 1)


def _end_with_parent(parent: int, _: int) -> None:
    """A worker ends when the process `parent` does, and not by a signal to the whole group before it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # even one that is stopped, or hangs in a read
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
