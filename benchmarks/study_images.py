"""The study's images: unpacked, a part of them held out or left out, by folders of links."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tinymim_fast.data import scan
from tinymim_fast.data.index import INDEX_FILE
from tinymim_fast.errors import InputError

PROBED_PER_CLASS = 1000  # training images whose features the probes take: all would cost more than the training
HELD_OUT = 10  # every so many-th training image


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own as the with block ends.

    Not `whole_folder`, which syncs every file: here are 55,000, which can be made again.
    """
    temporary = folder.with_name(f"tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(folder)


def unpack(data_path: Path, out: Path) -> Path:
    """The folder with train/ and val/: `data_path`, or what the archive holds, unpacked once into `out`/images.

    Raises:
        InputError: neither.
    """
    if data_path.is_dir():
        return data_path.resolve()
    images = out / "images"
    if not images.exists():
        try:
            with _made(images) as folder, tarfile.open(data_path) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise InputError(
                f"{data_path}: no folder, and can't be unpacked: {error}", argument="--data-path"
            ) from error
    nested = [path for path in images.glob("*/train") if path.is_dir()]
    return nested[0].parent if nested and not (images / "train").is_dir() else images


def link_images(source: Path, target: Path, keep: Callable[[int], bool]) -> None:
    """`target`/<class>/ with links to those of `source`/<class>/'s sorted files whose number `keep` takes."""
    if target.exists():
        return
    with _made(target) as folder:
        for of_class in sorted(path for path in source.iterdir() if path.is_dir()):
            (folder / of_class.name).mkdir(parents=True)
            for number, file in enumerate(sorted(of_class.iterdir())):
                if keep(number):
                    (folder / of_class.name / file.name).symlink_to(file.resolve())


def prepare_images(source: Path, out: Path, *, held_out: bool, per_class: int | None = None) -> Path:
    """Folders of links: `out`/data to train and fine-tune on, `out`/probed, fewer, for the probes; both scanned.

    Args:
        source: folder with train/ and val/.
        out: of the study.
        held_out: validate on a tenth of the training images, which are then not trained on.
        per_class: training images of each class, about; None: all.

    Raises:
        InputError: a split is missing.
    """
    for split in ("train", "val"):
        if not (source / split).is_dir():
            raise InputError(f"{source}: has no {split}/<class>/", argument="--data-path")
    validation = source / ("train" if held_out else "val")
    data, probed = out / "data", out / "probed"
    for folder in (data, probed):
        folder.mkdir(parents=True, exist_ok=True)
        link_images(validation, folder / "val", lambda n: not held_out or n % HELD_OUT == 0)
    most = per_class or sys.maxsize
    link_images(source / "train", data / "train", lambda n: n < most and (not held_out or n % HELD_OUT))
    link_images(data / "train", probed / "train", lambda n: n < PROBED_PER_CLASS)
    for folder in (data, probed):
        if not (folder / INDEX_FILE).exists():
            with contextlib.redirect_stdout(io.StringIO()):
                scan.main([str(folder)])
    return data
