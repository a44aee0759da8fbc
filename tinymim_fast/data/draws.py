"""The order of samples and all that is random about their views, as pure functions of (seed, epoch, sample).

No generator is carried along, so any step of a run can be recomputed alone: a resumed run, another number of
ranks or workers, and another loader all see the same crops. The draws follow torchvision's
`RandomResizedCrop`, `RandomHorizontalFlip` and `ColorJitter`, rounding and fallback included, and timm's RandAugment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinymim_fast.data.views import TrainView

if TYPE_CHECKING:  # timm, of which most loaders need nothing
    from tinymim_fast.data.rand_augment import RandAugment

BRIGHTNESS, CONTRAST, SATURATION = range(3)  # the jitter operations, as numbered in `ViewDraws.jitter_order`

_ORDER_STREAM, _VIEW_STREAM, _REPLACEMENT_STREAM, _AUGMENT_STREAM = range(4)
_CROP_ATTEMPTS = 10  # torchvision's
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of uint64 whose outputs look random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_uniforms(keys: tuple[int, ...], sample_ids: np.ndarray, n: int) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix(state + _GOLDEN + np.array([int(key) % 2**64], dtype=np.uint64))
    state = _mix(state + _GOLDEN * (np.asarray(sample_ids).astype(np.uint64) + np.uint64(1)))  # (len,)
    bits = _mix(state[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))  # (len, n)
    return (bits >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, epoch: int, sample_ids: np.ndarray, n: int) -> np.ndarray:
    """Independent uniforms for each sample of an epoch: splitmix64 streams keyed by (seed, epoch, sample).

    Args:
        seed: any integer.
        epoch: pass over the data, from 0.
        sample_ids: (len,) integers >= 0.
        n: uniforms per sample. The first ones don't depend on how many are asked for.

    Returns:
        (len, n) float64 in [0, 1); a row depends on its own sample alone, not on the batch it is in.
    """
    return _hash_uniforms((seed, _VIEW_STREAM, epoch), sample_ids, n)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its n samples: an (n,) int64 permutation."""
    # argsort of hashes instead of Generator.permutation, whose streams may change between numpy versions
    return np.argsort(_hash_uniforms((seed, _ORDER_STREAM, epoch), np.arange(n), 1)[:, 0], kind="stable")


def draw_replacements(sample_id: int, num_samples: int, num_draws: int, *, seed: int, epoch: int) -> list[int]:
    """The samples to try, in this order, in place of one whose file can't be decoded."""
    draws = _hash_uniforms((seed, _REPLACEMENT_STREAM, epoch), np.array([sample_id]), num_draws)[0]
    return np.floor(draws * num_samples).astype(np.int64).tolist()


@dataclass(frozen=True, eq=False)
class ViewDraws:
    """What to do to each image of a batch of n: one crop and flip for both views, jitter for the second.

    Args:
        top, left, height, width: (n,) int32, the crop in pixels of the stored image.
        flip: (n,) bool, mirror left to right.
        jitter: (n, 3) float64, factors of BRIGHTNESS, CONTRAST and SATURATION in this order.
        jitter_order: (n, 3) int32, the operations in the order in which they are applied.
        operations, arguments: (n, L), RandAugment's, see `RandAugment.draw`; no layers where the view has none.
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    jitter_order: np.ndarray
    operations: np.ndarray
    arguments: np.ndarray


def draw_views(
    sizes: np.ndarray,
    sample_ids: np.ndarray,
    view: TrainView,
    *,
    seed: int,
    epoch: int,
    rand_augment: RandAugment | None = None,
) -> ViewDraws:
    """Draw crop, flip, colour jitter and RandAugment for a batch, each sample from its own stream of `uniforms`.

    Args:
        sizes: (n, 2) height and width of the stored images, pixels.
        sample_ids: (n,) positions in the index, or other numbers that tell one view of an epoch from the others.
        view: ranges and probabilities. Ratios are drawn log-uniformly; a jitter strength x gives factors uniform in
            [max(0, 1 - x), 1 + x].
        seed, epoch: key of the streams, with the sample id.
        rand_augment: the one that `view` names.
    """
    u = uniforms(seed, epoch, sample_ids, 2 * _CROP_ATTEMPTS + 9)
    areas, ratios, rest = np.split(u, [_CROP_ATTEMPTS, 2 * _CROP_ATTEMPTS], axis=1)
    height, width = _crop_sizes(sizes, areas, ratios, view.scale, view.ratio)
    is_fallback = height == 0
    fallback_height, fallback_width = _fallback_sizes(sizes, view.ratio)
    height = np.where(is_fallback, fallback_height, height)
    width = np.where(is_fallback, fallback_width, width)
    spare_height, spare_width = sizes[:, 0] - height, sizes[:, 1] - width
    top = np.where(is_fallback, spare_height // 2, np.floor(rest[:, 0] * (spare_height + 1)))
    left = np.where(is_fallback, spare_width // 2, np.floor(rest[:, 1] * (spare_width + 1)))

    strength = np.asarray(view.color_jitter or (0.0, 0.0, 0.0))
    low, high = np.maximum(0.0, 1 - strength), 1 + strength
    operations, arguments = _draw_augment(rand_augment, sample_ids, seed=seed, epoch=epoch)
    return ViewDraws(
        top=top.astype(np.int32),
        left=left.astype(np.int32),
        height=height.astype(np.int32),
        width=width.astype(np.int32),
        flip=rest[:, 2] < view.hflip,
        jitter=low + (high - low) * rest[:, 3:6],
        jitter_order=np.argsort(rest[:, 6:9], axis=1, kind="stable").astype(np.int32),
        operations=operations,
        arguments=arguments,
    )


def _draw_augment(
    rand_augment: RandAugment | None, sample_ids: np.ndarray, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    if rand_augment is None:
        return np.empty((len(sample_ids), 0), dtype=np.int32), np.empty((len(sample_ids), 0))
    return rand_augment.draw(_hash_uniforms((seed, _AUGMENT_STREAM, epoch), sample_ids, rand_augment.num_uniforms))


def _crop_sizes(sizes, areas, ratios, scale, ratio) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the first of ten attempts that fits in the image; 0 where none does."""
    image_height, image_width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * areas)  # (n, attempts)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * ratios)
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    first = (np.arange(len(sizes)), fits.argmax(axis=1))
    return np.where(fits[first], height[first], 0), np.where(fits[first], width[first], 0)


def _fallback_sizes(sizes, ratio) -> tuple[np.ndarray, np.ndarray]:
    """The largest crop of an allowed aspect ratio, as torchvision takes it when ten attempts have failed."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    aspect = width / height
    crop_height = np.where(aspect < min(ratio), np.rint(width / min(ratio)), height)
    crop_width = np.where(aspect > max(ratio), np.rint(height * max(ratio)), width)
    return crop_height, crop_width
