"""What is in an image folder: relative paths, labels and stored sizes, found once and kept as one .npz file."""

from __future__ import annotations

import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim_fast.data.errors import DataError, name_some

log = logging.getLogger(__name__)

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_PIL_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_FORMAT = "tinymim_fast image index 1"
_LAYOUT = "want DIR/<class>/*.jpg, DIR/train/<class>/*.jpg, or images directly in DIR"


@dataclass(frozen=True, eq=False)
class ImageFolderIndex:
    """The images of one split of a folder, in a fixed order.

    Args:
        root: the split's folder.
        paths: n file paths relative to `root`, with "/", sorted within each class.
        labels: (n,) int64, positions in `class_names`.
        class_names: sorted names of the class folders; one name for a folder without class folders.
        sizes: (n, 2) int32, stored height and width in pixels. EXIF orientation is not applied, as in
            torchvision's ImageFolder.
        unreadable: relative paths that were left out because their header could not be read.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    sizes: np.ndarray
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, sample_id: int) -> str:
        """The full path of one sample."""
        return os.path.join(self.root, self.paths[sample_id])

    def read_image(self, sample_id: int) -> Image.Image:
        """Decode one sample to RGB.

        Raises:
            DataError: the file is missing or damaged, or no longer has the indexed size; names it.
        """
        file = self.file(sample_id)
        try:
            with Image.open(file) as image:
                decoded = image.convert("RGB")
        except (*_PIL_ERRORS, EOFError) as error:
            raise DataError(f"got {file}, which can't be decoded: {error}; replace or remove it") from error
        if (decoded.height, decoded.width) != tuple(self.sizes[sample_id]):
            height, width = self.sizes[sample_id]
            raise DataError(
                f"got {file} of {decoded.height} x {decoded.width} pixels, want the indexed {height} x {width}; "
                "it changed since the folder was scanned: scan again"
            )
        return decoded

    def save(self, path: str | Path) -> None:
        """Write the index to `path` (.npz): under a temporary name first, so readers never see half a file."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    format=_FORMAT,
                    root=_pack([str(self.root)]),
                    paths=_pack(self.paths),
                    labels=self.labels,
                    class_names=_pack(self.class_names),
                    sizes=self.sizes,
                    unreadable=_pack(self.unreadable),
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> ImageFolderIndex:
        """Read what `save` wrote.

        Raises:
            DataError: `path` is missing or holds something else.
        """
        try:
            with np.load(path) as data:
                if str(data["format"]) != _FORMAT:
                    raise KeyError("format")
                return cls(
                    root=Path(_unpack(data["root"])[0]),
                    paths=_unpack(data["paths"]),
                    labels=data["labels"],
                    class_names=tuple(_unpack(data["class_names"])),
                    sizes=data["sizes"],
                    unreadable=tuple(_unpack(data["unreadable"])),
                )
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"got {path}, want an image index written by ImageFolderIndex.save: {error}") from error


def _pack(names) -> np.ndarray:
    """Names as one zero-separated byte string: no padding to the longest, any file name survives."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), dtype=np.uint8)


def _unpack(packed: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in packed.tobytes().split(b"\0")[:-1]]


def scan_image_folder(root: str | Path, *, split: str | None = None, workers: int = 8) -> ImageFolderIndex:
    """List the images of a folder laid out as `root/<class>/**/*.jpg`, with their labels and sizes.

    Classes and labels are torchvision's: sorted class folders, hidden ones left out. A folder without class
    folders that hold images may hold images directly; they all get the label 0. Only headers are read.

    Args:
        root: the split's folder, or the folder that contains it.
        split: name of a subfolder ("train") to use instead of `root` where it exists.
        workers: threads that read headers.

    Returns:
        The index. Files whose header can't be read are left out, logged, and listed in `unreadable`.

    Raises:
        DataError: no such folder, nothing in it, no images in it, or no readable image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"got {root}, which is no folder; {_LAYOUT}")
    if split is not None and (root / split).is_dir():
        root = root / split
    class_names, candidates, labels = _list_images(root)
    if not candidates:
        state = "has no images" if any(root.iterdir()) else "is empty"
        raise DataError(f"got {root}, which {state}; {_LAYOUT} (any of {' '.join(IMG_EXTENSIONS)})")

    full_paths = [os.path.join(root, path) for path in candidates]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        parts = [full_paths[i : i + 256] for i in range(0, len(full_paths), 256)]  # a future for each file is slow
        sizes = [size for part in pool.map(_stored_sizes, parts) for size in part]
    readable = [i for i, size in enumerate(sizes) if size is not None]
    unreadable = tuple(path for path, size in zip(candidates, sizes) if size is None)
    if not readable:
        raise DataError(f"got {root}, where no image has a readable header: {name_some(unreadable)}")
    if unreadable:
        log.warning(
            "%s: left out %d of %d images, their headers can't be read: %s",
            root,
            len(unreadable),
            len(candidates),
            name_some(unreadable),
        )
    return ImageFolderIndex(
        root=root,
        paths=[candidates[i] for i in readable],
        labels=np.array([labels[i] for i in readable], dtype=np.int64),
        class_names=class_names,
        sizes=np.array([sizes[i] for i in readable], dtype=np.int32),
        unreadable=unreadable,
    )


def _list_images(root: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, relative image paths and labels."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    per_class = [sorted(_walk(root, name)) for name in folders]
    if any(per_class):
        empty = [name for name, paths in zip(folders, per_class) if not paths]
        if empty:  # they keep their label, so that two splits of one data set agree
            log.warning("%s: classes without images: %s", root, name_some(empty))
        paths = [path for paths in per_class for path in paths]
        labels = [label for label, paths in enumerate(per_class) for _ in paths]
        return tuple(folders), paths, labels
    paths = sorted(entry.name for entry in os.scandir(root) if _is_image(entry.name) and entry.is_file())
    return (root.resolve().name,), paths, [0] * len(paths)


def _walk(root: Path, folder: str):
    for base, _, files in os.walk(root / folder, followlinks=True):
        relative = Path(base).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in files if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _stored_sizes(paths: list[str]) -> list[tuple[int, int] | None]:
    return [_stored_size(path) for path in paths]


def _stored_size(path: str) -> tuple[int, int] | None:
    """(height, width) from the header alone, or None where there is none."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _PIL_ERRORS:
        return None
