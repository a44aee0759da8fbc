"""The ledger of images that can't be decoded: what takes their place, how many may be, and the error for too many."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from tinymim_fast.data.draws import draw_replacements
from tinymim_fast.data.errors import DataError, ImageError, name_some
from tinymim_fast.data.headers import Verdict
from tinymim_fast.data.index import ImageIndex

_REPLACEMENTS = 16  # of one sample to try; all fail where something else than a few files is broken

_NO_RANGE = "values without a known range: integers of 32 bits, or floating point beyond 0 to 255"


class BadFiles:
    """Images of an index that can't be decoded: left out by its scan, or found since by loaders, which write here.

    A sample that is known to be bad is replaced without another try at its file.

    Args:
        index: the images.
        max_share: largest share of them, those left out by the scan included, that may be bad; of 1.

    Attributes:
        reasons: sample id -> why it can't be decoded: values without a range by the scan, and what was found since.
    """

    def __init__(self, index: ImageIndex, max_share: float = 1.0):
        self.index, self.max_share = index, max_share
        self.reasons: dict[int, str] = {}
        if index.verdicts is not None:
            self.update(dict.fromkeys(np.flatnonzero(index.verdicts & Verdict.NO_RANGE).tolist(), _NO_RANGE))

    def add(self, sample_id: int, reason: str) -> None:
        """A loader found this one."""
        self.reasons[sample_id] = reason

    def update(self, reasons: Mapping[int, str]) -> None:
        """Other ranks, workers or an earlier run found these."""
        self.reasons.update(reasons)

    def recheck(self, paths: Container[str]) -> None:
        """Add those of `paths`, found by an earlier run, that still can't be decoded: repaired ones are taken again."""
        for sample_id, path in enumerate(self.index.paths):
            if path in paths:
                try:
                    self.index.read_image(sample_id)
                except ImageError as error:
                    self.add(sample_id, error.reason)

    @property
    def by_path(self) -> dict[str, str]:
        """Every bad file's name in the index, with the reason; those that the scan left out first."""
        return {**self.index.damaged, **{self.index.paths[i]: reason for i, reason in self.reasons.items()}}

    @property
    def too_many(self) -> bool:
        """Whether their share is larger than `max_share`."""
        return len(self.index.damaged) + len(self.reasons) > self.max_share * self.index.num_listed

    def error(self) -> DataError:
        """What to raise where there are `too_many`; its argument is "max_bad_files"."""
        bad = self.by_path
        files = name_some(f"{path} ({reason})" for path, reason in bad.items())
        return DataError(
            f"got {self.max_share:g}, and {len(bad)} of {self.index.num_listed} images in {self.index.root} can't be "
            f"decoded ({len(bad) / self.index.num_listed:.2g} of all): {files}. Repair them, or allow more",
            argument="max_bad_files",
        )

    def replace(self, sample_ids: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """Whose files to read for these samples: their own, or another's where theirs is bad.

        A replacement is a function of (seed, epoch, sample) and of which files are bad, and of nothing else.

        Args:
            sample_ids: (n,) int64.
            seed: of the run.
            epoch: pass over the data, from 0.

        Returns:
            (n,) int64; `sample_ids` itself where none is bad.

        Raises:
            DataError: the replacements of a sample are bad too.
        """
        if not self.reasons:
            return sample_ids
        ids = [self._replacement(i, seed, epoch) if i in self.reasons else i for i in sample_ids.tolist()]
        return np.array(ids, dtype=np.int64)

    def _replacement(self, sample_id: int, seed: int, epoch: int) -> int:
        draws = draw_replacements(sample_id, len(self.index), _REPLACEMENTS, seed=seed, epoch=epoch)
        for other in draws:
            if other not in self.reasons:
                return other
        raise DataError(
            f"got {self.index.file(draws[-1])}, which can't be decoded ({self.reasons[draws[-1]]}), like "
            f"{len(self.reasons)} more images of {self.index.root}; are they still there?"
        )
