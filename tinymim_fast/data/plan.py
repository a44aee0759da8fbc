"""Which samples make up each batch of each rank, and what happens to them: all that a loader has to apply."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tinymim_fast.data.draws import TwoViewParams, draw_replacements, draw_two_view_params, epoch_order
from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.index import ImageIndex

_REPLACEMENTS = 16  # of one sample to try; all fail where something else than a few files is broken

_order_of_epoch = lru_cache(maxsize=2)(epoch_order)  # two, for prefetching over an epoch's end


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainPlan:
    """The micro-batches of one rank, numbered from 0 across epochs; see `build_loader` for the fields.

    `bad` holds the samples whose files turned out not to decode, with the reason; loaders add to it.
    """

    index: ImageIndex
    batch_size: int
    img_size: int
    views: int
    seed: int
    rank: int
    world_size: int
    accumulation_steps: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    color_jitter: tuple[float, float, float]
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.views not in (1, 2):
            raise DataError(f"got views={self.views}, want 1 or 2")
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"got rank={self.rank}, want 0 <= rank < world_size={self.world_size}")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"got --train-batch-size {self.global_batch_size} for {len(self.index)} images in {self.index.root}; "
                f"want at most {len(self.index)}"
            )

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step over all ranks and micro-batches."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the rest of the order is dropped, another rest in each epoch."""
        return len(self.index) // self.global_batch_size

    def sample_ids(self, number: int) -> np.ndarray:
        """(batch_size,) int64: micro-batch a of a step is the step's a-th block, of which each rank has a slice."""
        step, micro = divmod(number, self.accumulation_steps)
        step_in_epoch = step % self.steps_per_epoch
        start = step_in_epoch * self.global_batch_size + (micro * self.world_size + self.rank) * self.batch_size
        return _order_of_epoch(len(self.index), self.seed, self._epoch(number))[start : start + self.batch_size]

    def read_ids(self, number: int) -> np.ndarray:
        """(batch_size,) int64, whose files to read: `sample_ids(number)`, with those in `bad` replaced.

        A replacement depends on (seed, epoch, sample) and on which files can't be decoded, on nothing else.

        Raises:
            DataError: the replacements of a sample are bad too.
        """
        sample_ids = self.sample_ids(number)
        if not self.bad:
            return sample_ids
        return np.array([self._replace(i, number) if i in self.bad else i for i in sample_ids.tolist()], dtype=np.int64)

    def _replace(self, sample_id: int, number: int) -> int:
        draws = draw_replacements(sample_id, len(self.index), _REPLACEMENTS, seed=self.seed, epoch=self._epoch(number))
        for other in draws:
            if other not in self.bad:
                return other
        raise DataError(
            f"got {self.index.file(draws[-1])}, which can't be decoded ({self.bad[draws[-1]]}), like {len(self.bad)} more "
            f"images of {self.index.root}; are they still there?"
        )

    def _epoch(self, number: int) -> int:
        return number // self.accumulation_steps // self.steps_per_epoch

    def params(self, number: int) -> TwoViewParams:
        """Augmentation of micro-batch `number`: drawn for `sample_ids(number)`, fitted to the sizes of `read_ids(number)`."""
        return draw_two_view_params(
            self.index.sizes[self.read_ids(number)],
            self.sample_ids(number),
            seed=self.seed,
            epoch=self._epoch(number),
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
        )


@dataclass(frozen=True, eq=False)
class CenterCrops:
    """Sizes and anchors of a batch of n: (n,) int32, pixels; `top` and `left` in the resized image."""

    height: np.ndarray
    width: np.ndarray
    top: np.ndarray
    left: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalPlan:
    """The batches of one rank for evaluation, in index order; see `build_eval_loader` for the fields."""

    index: ImageIndex
    batch_size: int
    img_size: int
    resize_size: int
    rank: int
    world_size: int

    def __post_init__(self):
        if self.index.damaged:
            raise DataError(
                f"got {self.index.root}, where {len(self.index.damaged)} images can't be decoded: "
                f"{name_some(self.index.damaged)}; replace or remove them, an evaluation counts all images"
            )
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"got rank={self.rank}, want 0 <= rank < world_size={self.world_size}")
        if self.resize_size < self.img_size:
            raise DataError(f"got resize_size={self.resize_size}, want at least img_size={self.img_size}")

    @property
    def shard(self) -> range:
        """This rank's samples: contiguous, sizes differ by one at most, together each sample exactly once."""
        n = len(self.index)
        return range(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)

    @property
    def num_batches(self) -> int:
        return -(-len(self.shard) // self.batch_size)

    def sample_ids(self, number: int) -> np.ndarray:
        """(up to batch_size,) int64; only a rank's last batch is smaller."""
        return np.array(self.shard[number * self.batch_size : (number + 1) * self.batch_size], dtype=np.int64)

    read_ids = sample_ids  # all of them, or an error

    def params(self, number: int) -> CenterCrops:
        """torchvision's `Resize(resize_size)` and `CenterCrop(img_size)`, roundings included."""
        size = self.index.sizes[self.sample_ids(number)].astype(np.int64)  # (n, 2)
        resized = np.floor(self.resize_size * size / size.min(axis=1, keepdims=True))
        anchor = np.rint((resized - self.img_size) / 2)
        (height, width), (top, left) = resized.astype(np.int32).T, anchor.astype(np.int32).T
        return CenterCrops(height=height, width=width, top=top, left=left)
