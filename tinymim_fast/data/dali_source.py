"""What DALI is fed: the stored bytes of each batch, read ahead and checked, and the parameters of its views.

DALI 2.4's decoders end the process on pixel types that they don't take and on crops beyond the picture, so bytes that
they may not take are decoded by PIL and handed on as an uncompressed picture; the graph compares sizes before it
decodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.draws import ViewDraws
from tinymim_fast.data.errors import ImageError
from tinymim_fast.data.headers import Verdict
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.plan import CenterCrops, EvalPlan, TrainPlan
from tinymim_fast.data.threads import Readers
from tinymim_fast.data.views import TrainView

if TYPE_CHECKING:  # timm, of which most loaders need nothing
    from tinymim_fast.data.rand_augment import RandAugment

# What DALI's own operations do of timm's; what moves pixels is one operation with a matrix.
KINDS = (
    *("Warp", "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "Desaturate", "GaussianBlur"),
)

_AHEAD = 1  # batches that are being read while DALI takes one; DALI's own queue comes behind it


class DaliSource:
    """Batches in order, as DALI takes them; files that can't be read go into the ledger and others take their place.

    Args:
        plan: the batches.
        bad_files: the ledger.
        threads: read files, and decode those that PIL must.
        num_threads: how many they are.
        num_kept: batches whose bytes stay alive after they were handed out: DALI reads them where they lie.
    """

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        bad_files: BadFiles,
        threads: Readers,
        num_threads: int,
        num_kept: int,
    ):
        self.plan, self.bad_files = plan, bad_files
        self._threads, self._num_threads = threads, num_threads
        self._kept: deque[tuple] = deque(maxlen=num_kept)

    def batches(self, numbers: Sequence[int]) -> Iterator[tuple]:
        """(encoded, sizes, *parameters) of each batch number: n of (bytes,) uint8, (n, 2) int32, and arrays (n, ...).

        Raises:
            DataError: a shard is missing or truncated, hardly any file can be read; in evaluation, one can't.
        """
        reading = deque()
        for i, number in enumerate(numbers):
            for ahead in numbers[i + len(reading) : i + 1 + _AHEAD]:
                reading.append(self._begin(ahead))
            batch = self._finish(number, *reading.popleft())
            self._kept.append(batch)
            yield batch

    def _begin(self, number: int) -> tuple[list[int], list[Future]]:
        """The samples to read and their reading, in so many parts as there are threads."""
        read_ids = self.plan.read_ids(number, self.bad_files).tolist()
        size = -(-len(read_ids) // self._num_threads)
        parts = [read_ids[i : i + size] for i in range(0, len(read_ids), size)]
        return read_ids, [self._threads.submit(_read, self.plan.index, part) for part in parts]

    def _finish(self, number: int, read_ids: list[int], parts: list[Future]) -> tuple:
        found = dict(zip(read_ids, (one for part in parts for one in self._threads.result(part)), strict=True))
        while True:
            bad = {i: one for i, one in found.items() if isinstance(one, ImageError)}
            if bad and isinstance(self.plan, EvalPlan):
                raise next(iter(bad.values()))
            self.bad_files.update({i: error.reason for i, error in bad.items()})
            wanted = self.plan.read_ids(number, self.bad_files)
            missing = [i for i in wanted.tolist() if i not in found]
            if not missing:
                break
            reading = self._threads.submit(_read, self.plan.index, missing)
            found.update(zip(missing, self._threads.result(reading), strict=True))
        encoded = [found[i] for i in wanted.tolist()]
        return encoded, self.plan.index.sizes[wanted], *_parameters(self.plan, number, wanted)


def _read(index: ImageIndex, sample_ids: list[int]) -> list[np.ndarray | ImageError]:
    """The files of some samples as bytes that DALI decodes, and errors in the places of those that can't be read."""
    found: list[np.ndarray | ImageError] = []
    for sample_id in sample_ids:
        try:
            encoded = index.encoded(sample_id)
            found.append(encoded if _is_for_dali(index, sample_id, encoded) else _as_ppm(index, sample_id, encoded))
        except ImageError as error:
            found.append(error)
    return found


def _is_for_dali(index: ImageIndex, sample_id: int, encoded: np.ndarray) -> bool:
    """Whether DALI decodes these bytes as PIL does: RGB and grey JPEG, RGB and grey PNG of 8 bits, still WebP."""
    if index.verdicts is not None and index.verdicts[sample_id] & (Verdict.CMYK | Verdict.SIXTEEN_BIT):
        return False
    head = encoded[:32].tobytes()
    if head.startswith(b"\xff\xd8\xff"):
        return True
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return head[24:25] == b"\x08" and head[25:26] in (b"\x00", b"\x02", b"\x06")  # depth; grey, RGB, RGBA
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return head[12:16] in (b"VP8 ", b"VP8L")
    return False


def _as_ppm(index: ImageIndex, sample_id: int, encoded: np.ndarray) -> np.ndarray:
    image = index.decode(sample_id, encoded)
    return np.frombuffer(b"P6\n%d %d\n255\n" % image.size + image.tobytes(), dtype=np.uint8)


def _parameters(plan: TrainPlan | EvalPlan, number: int, read_ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """The parameters of a batch as arrays (n, ...)."""
    params = plan.params(number, read_ids)
    if isinstance(params, CenterCrops):
        return _eval_parameters(params)
    labels = (plan.labels(read_ids),) if plan.view.labels else ()
    return (*_train_parameters(params, plan.view, plan.rand_augment), *labels)


def _train_parameters(draws: ViewDraws, view: TrainView, rand_augment: RandAugment | None) -> tuple[np.ndarray, ...]:
    crop = (np.stack([draws.top, draws.left], axis=1), np.stack([draws.height, draws.width], axis=1))  # (n, 2) each
    parameters = (*crop, draws.flip.astype(np.int32))
    if view.is_jittered:
        order = np.ascontiguousarray(draws.jitter_order.T)  # (stages, n)
        return (*parameters, *order, *np.take_along_axis(draws.jitter.T, order, axis=0).astype(np.float32))
    if view.is_changed:
        return (*parameters, _augment_rows(draws, rand_augment, view.sizes[-1]))
    return parameters


def _augment_rows(draws: ViewDraws, rand_augment: RandAugment, size: int) -> np.ndarray:
    """(n, layers, 9) float64: timm's operation and argument; for DALI's own operations the kind and a matrix."""
    names = [name.removesuffix("Increasing") for name in rand_augment.names]
    kinds = np.array([KINDS.index(name) if name in KINDS else KINDS.index("Warp") for name in names])
    kind = np.where(draws.operations < 0, -1, kinds[draws.operations])
    columns = np.stack([draws.operations, draws.arguments, kind], axis=2)
    return np.concatenate([columns, rand_augment.matrices(draws.operations, draws.arguments, size)], axis=2)


def _eval_parameters(crops: CenterCrops) -> tuple[np.ndarray, ...]:
    part = np.stack([crops.part_top, crops.part_left], axis=1), np.stack([crops.part_height, crops.part_width], axis=1)
    size, anchor = np.stack([crops.height, crops.width], axis=1), np.stack([crops.top, crops.left], axis=1)
    return (*part, size.astype(np.float32), anchor)
