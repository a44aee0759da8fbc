"""The public loaders: what to load comes from a plan, how from DALI or torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from types import ModuleType
from typing import Literal

import torch

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.errors import DataError
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.plan import EvalPlan, TrainPlan
from tinymim_fast.data.views import EvalView, TrainView

log = logging.getLogger(__name__)

LoaderName = Literal["auto", "dali", "torchvision"]
_NEEDS = {"dali": "nvidia.dali", "torchvision": "torchvision"}
DALI_KWARGS = {  # with the type, and the least and the largest value
    "hw_decoder_load": (float, 0, 1),
    "device_memory_padding": (int, 0, 1 << 36),
    "host_memory_padding": (int, 0, 1 << 36),
    "prefetch_queue_depth": (int, 1, 64),
}


class _Loader:
    """Starts iterations over a plan's batches and ends all of them on `close`, or at the end of a with block."""

    def __init__(self, plan: TrainPlan | EvalPlan, bad_files: BadFiles, backend: ModuleType, options: dict):
        self.plan, self.bad_files = plan, bad_files
        self._backend = backend
        self._options = options
        self._running: weakref.WeakSet[Generator] = weakref.WeakSet()

    def _start(self, numbers: range) -> Generator[tuple[torch.Tensor, ...], None, None]:
        batches = self._backend.batches(self.plan, self.bad_files, numbers, **self._options)
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
    """Endless, resumable training batches of one rank; made by `build_loader`.

    Attributes:
        plan: the batches, a `TrainPlan`.
        bad_files: the ledger that files which can't be decoded are written into as they are met; others take their
            place.
    """

    plan: TrainPlan

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last, incomplete global batch is dropped."""
        return self.plan.steps_per_epoch

    def batches(self, start_step: int, num_steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Micro-batches of the optimizer steps start_step .. start_step + num_steps - 1, counted across epochs.

        Returns:
            Iterator of accumulation_steps * num_steps tuples of tensors (B, 3, S, S) on the loader's device, S by
            `view.sizes`: (teacher_view, student_view), or (view,); with `view.labels` the classes, int64 (B,), come
            behind them. Same step, same values, whatever the start. Prefetching goes on over the ends of epochs.

        Raises:
            DataError: while iterating, for a missing or truncated shard, or many files in a row that can't be decoded.
        """
        micro_per_step = self.plan.batches.accumulation_steps
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
    view: TrainView,
    batches: BatchPlan,
    *,
    loader: LoaderName = "auto",
    seed: int,
    rank: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 8,
    prefetch: int = 2,
    bad_files: BadFiles | None = None,
    dali_kwargs: Mapping[str, float] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> TrainLoader:
    """Build the training loader of one rank.

    The global batch of step k is the k-th block of the epoch's order. Its samples, crops and jitter depend on (seed,
    epoch, sample) alone: not on the loader, the ranks, the workers or where a run was resumed.

    Args:
        index: the images.
        view: what is made of each; a clean and a changed view make batches of (teacher_view, student_view), one view
            (view,), either with the labels behind it where `view.labels` says so.
        batches: how a global batch is divided among ranks and into micro-batches.
        loader: "dali", "torchvision", or "auto": DALI where it is installed.
        seed: of order, crops and jitter; equal on all ranks.
        rank: this process among `batches.world_size`.
        device: where the views are wanted, "cpu" or a CUDA device with its index.
        workers: decoding threads (DALI, at least one) or processes (torchvision, 0 for none).
        prefetch: batches made ahead, in all (DALI) or by each worker (torchvision).
        bad_files: a ledger of `index` that says what can't be decoded already; by default an empty one.
        dali_kwargs: any of DALI's `hw_decoder_load`, 0 to 1, `device_memory_padding` and `host_memory_padding`, bytes
            (all of its decoder, on a GPU), and `prefetch_queue_depth`, which overrides `prefetch`; other loaders take
            no notice.
        waiting: called about once a second while a batch is waited for; an exception of it, as `DataLate`, ends the
            iteration, and readers that hang are left behind.

    Raises:
        DataError: an epoch would have no step, a bad setting, or the named loader is not installed.
    """
    plan = TrainPlan(index=index, view=view, batches=batches, seed=seed, rank=rank)
    backend = _backend(_able(loader, view, device), device, workers, prefetch, dali_kwargs or {}, waiting)
    return TrainLoader(plan, bad_files or BadFiles(index), *backend)


def build_eval_loader(
    index: ImageIndex,
    view: EvalView,
    *,
    batch_size: int,
    loader: LoaderName = "auto",
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 8,
) -> EvalLoader:
    """Build the evaluation loader of one rank: each image once over all ranks, in index order, without padding.

    Args:
        index: the images, none of them damaged.
        view: what is made of each.
        batch_size: images of a batch; the last one may be smaller.
        loader: as in `build_loader`.
        rank: this process among `world_size`.
        world_size: processes that share the images.
        device: where the images are wanted, as in `build_loader`.
        workers: as in `build_loader`.

    Raises:
        DataError: a bad setting, damaged images in the index, or the named loader is not installed.
    """
    plan = EvalPlan(index=index, view=view, batch_size=batch_size, rank=rank, world_size=world_size)
    return EvalLoader(plan, BadFiles(index), *_backend(_able(loader, view, device), device, workers, 2, {}))


def _able(loader: str, view: TrainView | EvalView, device: torch.device | str) -> str:
    """The loader, where "auto" leaves no choice: DALI has neither filter on a GPU."""
    alone = view.interpolation in ("box", "hamming") and torch.device(device).type == "cuda"
    return "torchvision" if loader == "auto" and alone else loader


def _backend(loader, device, workers, prefetch, dali_kwargs, waiting=lambda: None) -> tuple[ModuleType, dict]:
    """The module that applies plans, imported here, so that nobody pays for the other one, and its options."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        raise DataError(f"got {device}, want a CUDA device with its index, such as cuda:0", argument="device")
    unknown = set(dali_kwargs) - set(DALI_KWARGS)
    if unknown:
        got, want = (", ".join(names) for names in (sorted(unknown), DALI_KWARGS))
        raise DataError(f"got {got}, want any of {want}", argument="dali_kwargs")
    for name, value in dali_kwargs.items():
        kind, low, high = DALI_KWARGS[name]
        is_kind = isinstance(value, int | kind) and not isinstance(value, bool)
        if not is_kind or not low <= value <= high:
            raise DataError(
                f"got {name} of {value!r}, want {kind.__name__} from {low} to {high}", argument="dali_kwargs"
            )
    if loader == "auto":
        loader = "dali" if _is_installed("nvidia.dali") else "torchvision"
        log.info("loader: %s", loader)
    if loader not in _NEEDS:
        raise DataError(f"got {loader}, want auto or one of {', '.join(_NEEDS)}", argument="loader")
    if not _is_installed(_NEEDS[loader]):
        raise DataError(f"got {loader}, which needs {_NEEDS[loader]}; install it, or choose auto", argument="loader")
    name = {"dali": "dali_loader", "torchvision": "torchvision_loader"}[loader]
    options = {"device": device, "workers": workers, "prefetch": prefetch, "waiting": waiting}
    if loader == "dali":
        options["dali_kwargs"] = dali_kwargs
    return importlib.import_module(f"tinymim_fast.data.{name}"), options


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
