"""Which samples make up each batch of each rank, and what happens to them: all that a loader has to apply."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.draws import ViewDraws, draw_views, epoch_order
from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.views import EvalView, TrainView

if TYPE_CHECKING:  # timm, of which most loaders need nothing
    from tinymim_fast.data.rand_augment import RandAugment

_LONGEST = 64  # short sides; a crop in the centre of an evaluation sees less than one of them

_order_of_epoch = lru_cache(maxsize=2)(epoch_order)  # two, for prefetching over an epoch's end


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainPlan:
    """The micro-batches of one rank, numbered from 0 across epochs: a function of its fields, which nobody writes into.

    Args:
        index: the images.
        view: what is made of each.
        batches: how a global batch is divided.
        seed: of order, crops and jitter; equal on all ranks.
        rank: this process among `batches.world_size`.

    Raises:
        DataError: an epoch would have no step, or there is no such rank.
    """

    index: ImageIndex
    view: TrainView
    batches: BatchPlan
    seed: int
    rank: int

    def __post_init__(self):
        _check_rank(self.rank, self.batches.world_size)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"got {self.batches.global_batch_size} images a step for {len(self.index)} images in "
                f"{self.index.root}, want at most {len(self.index)}",
                argument="batches",
            )

    @property
    def batch_size(self) -> int:
        """Images of one micro-batch of this rank."""
        return self.batches.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the rest of the order is dropped, another rest in each epoch."""
        return len(self.index) // self.batches.global_batch_size

    def sample_ids(self, number: int) -> np.ndarray:
        """(batch_size,) int64: micro-batch a of a step is the step's a-th block, of which each rank has a slice."""
        order = _order_of_epoch(len(self.index), self.seed, self._epoch(number))
        return order[self._places(number) // self.view.repeats]

    def _places(self, number: int) -> np.ndarray:
        """(batch_size,) int64, places in the epoch: with repeated augmentation, that many in a row have one image."""
        step, micro = divmod(number, self.batches.accumulation_steps)
        block = micro * self.batches.world_size + self.rank
        start = (step % self.steps_per_epoch) * self.batches.global_batch_size + block * self.batch_size
        return np.arange(start, start + self.batch_size)

    def read_ids(self, number: int, bad_files: BadFiles) -> np.ndarray:
        """(batch_size,) int64, whose files to read: `sample_ids(number)`, with bad ones replaced.

        Raises:
            DataError: the replacements of a sample are bad too.
        """
        return bad_files.replace(self.sample_ids(number), seed=self.seed, epoch=self._epoch(number))

    def _epoch(self, number: int) -> int:
        return number // self.batches.accumulation_steps // self.steps_per_epoch

    def params(self, number: int, read_ids: np.ndarray) -> ViewDraws:
        """Crops, flips and what changes views: drawn for `sample_ids(number)`, fitted to the files `read_ids`.

        The second, third ... view of an image in an epoch (repeated augmentation) has streams of its own.
        """
        repeat = self._places(number) % self.view.repeats
        return draw_views(
            self.index.sizes[read_ids],
            self.sample_ids(number) + len(self.index) * repeat,
            self.view,
            seed=self.seed,
            epoch=self._epoch(number),
            rand_augment=self.rand_augment,
        )

    def labels(self, read_ids: np.ndarray) -> np.ndarray:
        """(n,) int64, the classes of the files that were read: a replacement's is its own."""
        return self.index.labels[read_ids].astype(np.int64)

    @cached_property
    def rand_augment(self) -> RandAugment | None:
        """What `view.rand_augment` names."""
        if self.view.rand_augment is None:
            return None
        from tinymim_fast.data.rand_augment import RandAugment

        return RandAugment(self.view.rand_augment, self.view.mean)


@dataclass(frozen=True, eq=False)
class CenterCrops:
    """What to do to each image of a batch of n: take a part of the stored image, resize it, crop its centre.

    Args:
        part_top, part_left, part_height, part_width: (n,) int32, pixels of the stored image; all of it unless it is
            very long.
        height, width: (n,) int32, pixels of the resized part.
        top, left: (n,) int32, anchor of the crop in the resized part.
    """

    part_top: np.ndarray
    part_left: np.ndarray
    part_height: np.ndarray
    part_width: np.ndarray
    height: np.ndarray
    width: np.ndarray
    top: np.ndarray
    left: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalPlan:
    """The batches of one rank for evaluation, in index order.

    Args:
        index: the images.
        view: what is made of each.
        batch_size: images of a batch of this rank.
        rank: this process among `world_size`.
        world_size: processes that share the images.

    Raises:
        DataError: images that can't be decoded, a crop larger than the resized image, or there is no such rank.
    """

    index: ImageIndex
    view: EvalView
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self):
        _check_rank(self.rank, self.world_size)
        if bad := BadFiles(self.index).by_path:
            raise DataError(
                f"got {self.index.root}, where {len(bad)} images can't be decoded: {name_some(bad)}; replace or remove "
                f"them, an evaluation counts all images"
            )

    @property
    def shard(self) -> range:
        """This rank's samples: contiguous, sizes differ by one at most, together each sample exactly once."""
        n = len(self.index)
        return range(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)

    @property
    def num_batches(self) -> int:
        """Batches of this rank; ranks may differ by one."""
        return -(-len(self.shard) // self.batch_size)

    def sample_ids(self, number: int) -> np.ndarray:
        """(up to batch_size,) int64; only a rank's last batch is smaller."""
        return np.array(self.shard[number * self.batch_size : (number + 1) * self.batch_size], dtype=np.int64)

    def read_ids(self, number: int, bad_files: BadFiles) -> np.ndarray:
        """`sample_ids(number)`: an evaluation replaces nothing."""
        return self.sample_ids(number)

    def params(self, number: int, read_ids: np.ndarray) -> CenterCrops:
        """torchvision's `Resize(resize_size)` and `CenterCrop(img_size)`, roundings included.

        Of an image longer than `_LONGEST` short sides, a part so long around its centre is resized, not gigabytes.
        """
        size = self.index.sizes[read_ids].astype(np.int64)  # (n, 2)
        short = size.min(axis=1, keepdims=True)
        part = np.where(
            size > _LONGEST * short, _LONGEST * short + (size - _LONGEST * short) % 2, size
        )  # as far on both sides
        resized = np.floor(self.view.resize_size * part / short)
        anchor = np.rint((resized - self.view.img_size) / 2)
        fields = np.stack([(size - part) // 2, part, resized.astype(np.int64), anchor.astype(np.int64)])  # (4, n, 2)
        (part_anchor, part, resized, anchor) = fields.astype(np.int32)
        return CenterCrops(*part_anchor.T, *part.T, *resized.T, *anchor.T)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise DataError(f"got {rank}, want 0 <= rank < world_size, {world_size}", argument="rank")
