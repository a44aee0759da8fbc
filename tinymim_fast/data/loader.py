"""The public loaders: what to load comes from a plan, how from DALI or torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Literal

import torch

from tinymim_fast.data.errors import DataError
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.plan import EvalPlan, TrainPlan

log = logging.getLogger(__name__)

LoaderName = Literal["auto", "dali", "torchvision"]
_NEEDS = {"dali": "nvidia.dali", "torchvision": "torchvision"}
DALI_KWARGS = ("hw_decoder_load", "device_memory_padding", "host_memory_padding", "prefetch_queue_depth")


class _Loader:
    """Starts iterations over a plan's batches and ends all of them on `close`, or at the end of a with block."""

    def __init__(self, plan: TrainPlan | EvalPlan, backend: ModuleType, options: dict):
        self.plan = plan
        self._backend = backend
        self._options = options
        self._running: weakref.WeakSet[Generator] = weakref.WeakSet()

    def _start(self, numbers: range) -> Generator[tuple[torch.Tensor, ...], None, None]:
        batches = self._backend.batches(self.plan, numbers, **self._options)
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """End worker processes and threads. Batches already handed out stay valid."""
        for batches in list(self._running):
            batches.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class TrainLoader(_Loader):
    """Endless, resumable training batches of one rank; made by `build_loader`."""

    plan: TrainPlan

    @property
    def bad(self) -> dict[int, str]:
        """Samples whose files could not be decoded, with the reason; each is replaced by another sample.

        Which one depends on (seed, epoch, sample) and on the files alone. Samples that are put here, as found by other
        ranks or an earlier run, are replaced without another try.
        """
        return self.plan.bad

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last, incomplete global batch is dropped."""
        return self.plan.steps_per_epoch

    def batches(self, start_step: int, num_steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Micro-batches of the optimizer steps start_step .. start_step + num_steps - 1, counted across epochs.

        Returns:
            Iterator of accumulation_steps * num_steps tuples of `views` tensors (B, 3, S, S) on the
            loader's device: (teacher_view, student_view), or (view,). Same step, same values, whatever the
            start. Prefetching goes on over the ends of epochs.

        Raises:
            DataError: while iterating, for a missing or truncated shard, or many files in a row that can't be decoded.
        """
        micro_per_step = self.plan.accumulation_steps
        return self._start(range(start_step * micro_per_step, (start_step + num_steps) * micro_per_step))


class EvalLoader(_Loader):
    """Each image exactly once over all ranks; made by `build_eval_loader`."""

    plan: EvalPlan

    def __len__(self) -> int:
        """Batches of this rank. Ranks may differ by one, so don't call collectives once a batch."""
        return self.plan.num_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(images, labels, sample_ids): float32 (B, 3, S, S), int64 (B,), int64 (B,), all on the loader's device.

        Raises:
            DataError: while iterating, for a file that can't be decoded; names it.
        """
        numbers = range(len(self))
        for number, (images,) in zip(numbers, self._start(numbers)):
            sample_ids = torch.from_numpy(self.plan.sample_ids(number))
            labels = torch.from_numpy(self.plan.index.labels)[sample_ids]
            yield images, labels.to(images.device), sample_ids.to(images.device)


def build_loader(
    index: ImageIndex,
    *,
    loader: LoaderName,
    batch_size: int,
    img_size: int,
    views: Literal[1, 2],
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    workers: int = 8,
    prefetch: int = 2,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: tuple[float, float, float] = (0.4, 0.4, 0.4),
    dtype: torch.dtype = torch.float32,
    dali_kwargs: Mapping[str, float] | None = None,
) -> TrainLoader:
    """Build the training loader of one rank.

    The global batch of step k is the k-th block of the epoch's order. Its samples and their augmentation depend
    on (seed, epoch, sample) alone: not on the loader, the ranks, the workers or where a run was resumed.

    Args:
        index: the images.
        loader: "dali", "torchvision", or "auto": DALI where it is installed.
        batch_size: images per micro-batch of this rank.
        img_size: side of the views, pixels.
        views: 2 for (teacher view, colour-jittered student view) of one crop, 1 for the crop alone.
        seed: of order and augmentation; equal on all ranks.
        mean, std: per channel, of 1.
        device: where the views are wanted, "cpu" or a CUDA device with its index.
        rank, world_size: this process among all that train together.
        accumulation_steps: micro-batches per optimizer step.
        workers: decoding threads (DALI, at least one) or processes (torchvision, 0 for none).
        prefetch: batches made ahead, in all (DALI) or by each worker (torchvision).
        scale, ratio: ranges of the crop's share of the area and of its width / height.
        hflip: probability of a horizontal flip of both views.
        color_jitter: brightness, contrast and saturation strengths, as in torchvision's ColorJitter.
        dtype: of the views, float32 or float16.
        dali_kwargs: any of DALI's `hw_decoder_load`, 0 to 1, `device_memory_padding` and `host_memory_padding`, bytes (all of
            its decoder, on a GPU), and `prefetch_queue_depth`, which overrides `prefetch`; other loaders take no notice.

    Raises:
        DataError: an epoch would have no step, a bad setting, or the named loader is not installed.
    """
    plan = TrainPlan(
        index=index,
        batch_size=batch_size,
        img_size=img_size,
        views=views,
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        color_jitter=color_jitter,
    )
    return TrainLoader(plan, *_backend(loader, device, workers, prefetch, mean, std, dtype, dali_kwargs or {}))


def build_eval_loader(
    index: ImageIndex,
    *,
    loader: LoaderName,
    batch_size: int,
    img_size: int,
    resize_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 8,
) -> EvalLoader:
    """Build the evaluation loader of one rank: resize the short side (bicubic, antialiased), crop the centre.

    Every image comes exactly once over all ranks, in index order, without padding; the last batch may be smaller.

    Args:
        resize_size: length of the short side after resizing, pixels; at least `img_size`.
        (the others as in `build_loader`)

    Raises:
        DataError: a bad setting, damaged images in the index, or the named loader is not installed.
    """
    plan = EvalPlan(
        index=index,
        batch_size=batch_size,
        img_size=img_size,
        resize_size=resize_size,
        rank=rank,
        world_size=world_size,
    )
    return EvalLoader(plan, *_backend(loader, device, workers, 2, mean, std, torch.float32, {}))


def _backend(loader, device, workers, prefetch, mean, std, dtype, dali_kwargs) -> tuple[ModuleType, dict]:
    """The module that applies plans, imported here, so that nobody pays for the other one, and its options."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        raise DataError(f'got device="{device}", want a CUDA device with its index, such as "cuda:0"')
    unknown = set(dali_kwargs) - set(DALI_KWARGS)
    if unknown:
        raise DataError(f"got --dali-kwargs {', '.join(sorted(unknown))}, want any of {', '.join(DALI_KWARGS)}")
    if loader == "auto":
        loader = "dali" if _is_installed("nvidia.dali") else "torchvision"
        log.info("--loader auto: using %s", loader)
    if loader not in _NEEDS:
        raise DataError(f'got --loader {loader}, want "auto" or one of {", ".join(_NEEDS)}')
    if not _is_installed(_NEEDS[loader]):
        raise DataError(f"got --loader {loader}, which needs {_NEEDS[loader]}; install it or pass --loader auto")
    name = {"dali": "dali_loader", "torchvision": "torchvision_loader"}[loader]
    options = {"device": device, "workers": workers, "prefetch": prefetch, "mean": mean, "std": std, "dtype": dtype}
    if loader == "dali":
        options["dali_kwargs"] = dali_kwargs
    return importlib.import_module(f"tinymim_fast.data.{name}"), options


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
