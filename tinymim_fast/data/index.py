"""Which images there are, with labels and stored sizes: found by one scan of their headers, kept as one .npz file."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from tinymim_fast.data.errors import DataError, ImageError, name_some
from tinymim_fast.data.headers import IMG_EXTENSIONS, Header, Verdict, decode_rgb, inspect_path
from tinymim_fast.data.shards import Sample, ShardMaps, find_shards, read_shard

log = logging.getLogger(__name__)

INDEX_FILE = "index.npz"
SPLITS = ("train", "val")
_FORMAT = "tinymim_fast image index 2"
_NAMES = ("root", "paths", "class_names", "damaged", "reasons", "shards", "stamped")  # of packed arrays in the file
_LAYOUT = "want DIR/<class>/*.jpg, DIR/train/<class>/*.jpg, images directly in DIR, or shards DIR/*.tar"
_FILES_PER_TASK = 256  # a task for each file is slow
Progress = Callable[[Iterable, int], Iterable]  # tqdm's shape: (parts, total)


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """The images of one split, in a fixed order: files of a folder or members of tar shards.

    Args:
        root: the split's folder, or the shards'.
        paths: n names with "/", sorted within each class: file paths relative to `root`, or names inside the shards.
        labels: (n,) int64, positions in `class_names`.
        class_names: of the class folders, sorted; one name for images without classes.
        sizes: (n, 2) int32, stored height and width in pixels. EXIF orientation is not applied, as in
            torchvision's ImageFolder.
        damaged: names that were left out, with the reason.
        num_bytes: (n,) int64, size of the stored files.
        verdicts: (n,) int16 of `Verdict`, what is odd about them.
        formats, modes: (n,) str, PIL's.
        shards: names of the tar files, relative to `root`; none for a folder.
        spans: (n, 2) int64, shard and position in it in bytes; None for a folder.
        stamps: by which a change since the scan shows: modification times of the class folders in ns, or sizes of the
            shards in bytes.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    sizes: np.ndarray
    damaged: dict[str, str] = field(default_factory=dict)
    num_bytes: np.ndarray | None = None
    verdicts: np.ndarray | None = None
    formats: np.ndarray | None = None
    modes: np.ndarray | None = None
    shards: tuple[str, ...] = ()
    spans: np.ndarray | None = None
    stamps: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_listed(self) -> int:
        """Images found, those left out included."""
        return len(self.paths) + len(self.damaged)

    def file(self, sample_id: int) -> str:
        """The full path of one sample, or its shard and its name in it."""
        if self.shards:
            return f"{os.path.join(self.root, self.shards[self.spans[sample_id, 0]])}: {self.paths[sample_id]}"
        return os.path.join(self.root, self.paths[sample_id])

    def encoded(self, sample_id: int) -> np.ndarray:
        """(bytes,) uint8, the stored file of a sample; of a shard, read-only and without a copy.

        Raises:
            ImageError: the file can't be read; names it.
            DataError: the shard is missing or truncated; names it.
        """
        if self.shards:
            return self._maps.view(*self.spans[sample_id].tolist(), int(self.num_bytes[sample_id]))
        try:
            return np.fromfile(self.file(sample_id), dtype=np.uint8)
        except OSError as error:
            raise ImageError(
                f"got {self.file(sample_id)}, which can't be read: {error.strerror}", error.strerror
            ) from error

    @cached_property
    def _maps(self) -> ShardMaps:
        return ShardMaps(self.root, self.shards)

    def read_image(self, sample_id: int) -> Image.Image:
        """Decode one sample to RGB.

        Raises:
            ImageError: the file is missing or damaged, or no longer has the indexed size; names it.
            DataError: its shard is missing or truncated; names it.
        """
        name = self.file(sample_id)
        decoded = decode_rgb(BytesIO(self.encoded(sample_id)) if self.shards else name, name)
        if (decoded.height, decoded.width) != tuple(self.sizes[sample_id]):
            height, width = self.sizes[sample_id]
            raise ImageError(
                f"got {name} of {decoded.height} x {decoded.width} pixels, want the indexed {height} x {width}; "
                "it changed since it was scanned: scan again",
                f"{decoded.height} x {decoded.width} pixels, not the indexed {height} x {width}",
            )
        return decoded

    def save(self, path: str | Path) -> None:
        """Write this index alone to `path`: see `save_indexes`."""
        save_indexes(path, {"": self}, home=self.root)

    @classmethod
    def load(cls, path: str | Path) -> ImageIndex:
        """Read what `save` wrote: see `load_index`."""
        return load_index(path)


def save_indexes(path: str | Path, splits: dict[str, ImageIndex], *, home: Path) -> None:
    """Write the splits of one data set to `path` (.npz): under a temporary name first, so nobody reads half a file.

    Args:
        path: the file.
        splits: index by split; "" for a data set without splits.
        home: folder of the data set, which holds each `root`.
    """
    path = Path(path)
    arrays = {"format": _FORMAT, "home": _pack([os.path.abspath(home)]), "splits": _pack(splits)}
    for split, index in splits.items():
        own = {
            "root": _pack([os.path.relpath(index.root, home)]),
            "paths": _pack(index.paths),
            "labels": index.labels,
            "class_names": _pack(index.class_names),
            "sizes": index.sizes,
            "damaged": _pack(index.damaged),
            "reasons": _pack(index.damaged.values()),
            "shards": _pack(index.shards),
            "stamped": _pack(index.stamps),
            "stamps": np.array(list(index.stamps.values()), dtype=np.int64),
        }
        for name in ("num_bytes", "verdicts", "formats", "modes", "spans"):
            if getattr(index, name) is not None:
                own[name] = getattr(index, name)
        arrays |= {f"{split}/{name}": array for name, array in own.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_index(path: str | Path, split: str | None = None, *, home: Path | None = None) -> ImageIndex:
    """Read one split of what `save_indexes` wrote.

    Args:
        path: the file.
        split: which; a file without splits has one for every name. None: the only one.
        home: where the data set lies now; by default where it was scanned.

    Raises:
        DataError: `path` is missing or holds something else, or not this split.
    """
    try:
        with np.load(path) as data:
            if str(data["format"]) != _FORMAT:
                raise KeyError("format")
            names = _unpack(data["splits"])
            found = "" if names == [""] else names[0] if split is None and len(names) == 1 else split
            if found not in names:
                raise DataError(f"got {path} with the splits {', '.join(names)}, want {split or 'one'}; scan again")
            own = {key.removeprefix(f"{found}/"): data[key] for key in data.files if key.startswith(f"{found}/")}
            text = {k: _unpack(own.pop(k)) for k in _NAMES}
            return ImageIndex(
                root=Path(os.path.normpath(os.path.join(home or _unpack(data["home"])[0], text["root"][0]))),
                paths=text["paths"],
                class_names=tuple(text["class_names"]),
                damaged=dict(zip(text["damaged"], text["reasons"])),
                shards=tuple(text["shards"]),
                stamps=dict(zip(text["stamped"], own.pop("stamps").tolist())),
                **own,
            )
    except DataError:
        raise
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"got {path}, want an image index written by python -m tinymim_fast.data.scan: {error}"
        ) from error


def _pack(names: Iterable[str]) -> np.ndarray:
    """Names as one zero-separated byte string: no padding to the longest, any file name survives."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), dtype=np.uint8)


def _unpack(packed: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in packed.tobytes().split(b"\0")[:-1]]


def find_images(path: str | Path, *, split: str = "train", workers: int = 8) -> ImageIndex:
    """The images of one split: from an index where there is one, else by a scan.

    Args:
        path: a folder (see `scan_images`) that may hold an index.npz, itself or in its subfolder `split`, or an
            index written elsewhere.
        split: "train" or "val".
        workers: processes for a scan.

    Raises:
        DataError: no such file or folder, or no images in it.
    """
    path = Path(path)
    candidates = [(path, None)] if path.is_file() or path.suffix == ".npz" else []
    candidates += [(home / INDEX_FILE, home) for home in (path, path / split)]
    for file, home in candidates:
        if home is not None and not file.is_file():
            continue
        index = load_index(file, split, home=home)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
        log.info("%s: %d images, scanned %s", file, len(index), when)
        _check_stamps(index, file)
        break
    else:
        index = scan_images(path, split=split, workers=workers)
    if index.damaged:
        named = _with_reasons(index.damaged)
        log.warning("%s: left out %d of %d images: %s", index.root, len(index.damaged), index.num_listed, named)
    return index


def _check_stamps(index: ImageIndex, file: Path) -> None:
    if not index.root.is_dir():
        raise DataError(f"got {file}, which lists images of {index.root}, which is no folder; scan where they are now")
    changed = [name for name, stamp in index.stamps.items() if _stamp(index.root / name) != stamp]
    if changed and index.shards:
        raise DataError(
            f"got shards in {index.root} that are missing, truncated or changed since the scan: {name_some(changed)}; copy "
            "or pack them again, or scan again"
        )
    if changed:
        log.warning(
            "%s: changed since the scan, so new files are missed: %s; run python -m tinymim_fast.data.scan again",
            index.root,
            name_some(changed),
        )


def _stamp(path: Path) -> int | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns if path.is_dir() else found.st_size


def scan_images(
    root: str | Path, *, split: str | None = None, workers: int = 8, progress: Progress | None = None
) -> ImageIndex:
    """List the images of a folder or of tar shards, with their labels and sizes. Only headers and ends are read.

    A folder is laid out as `root/<class>/**/*.jpg`. Classes and labels are torchvision's: sorted class folders,
    hidden ones left out. A folder without class folders that hold images may hold images directly; they all get the
    label 0. Shards are `root/*.tar` in webdataset's layout, with labels as `<key>.cls` or "label" in `<key>.json`.

    Args:
        root: the split's folder, or the folder that contains it or its shards.
        split: name of a subfolder ("train") to use instead of `root` where it exists, or of shards (train-*.tar).
        workers: processes.
        progress: wraps the parts of the work, as tqdm does.

    Returns:
        The index. Files that can't be decoded are left out and listed in `damaged`.

    Raises:
        DataError: no such folder, nothing in it, no images in it, no readable image in it, or a damaged shard.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"got {root}, which is no folder; {_LAYOUT}")
    if split is not None and (root / split).is_dir():
        root = root / split
    shards = find_shards(root)
    if shards:
        names = shards.get(split or "", shards.get("", []))
        if not names:
            raise DataError(f"got {root} with shards of {', '.join(shards)}, want some of {split}: {split or ''}-*.tar")
        index = _scan_shards(root, names, workers, progress)
    else:
        index = _scan_folder(root, workers, progress)
    if not index.paths:
        raise DataError(f"got {root}, where no image is readable: {_with_reasons(index.damaged)}")
    return index


def _with_reasons(damaged: dict[str, str]) -> str:
    return name_some(f"{name} ({reason})" for name, reason in damaged.items())


def splits_of(root: Path) -> list[str]:
    """The splits that a data set's folder holds, as subfolders or as names of shards; [""] where it has none."""
    subfolders = [split for split in SPLITS if (root / split).is_dir()]
    return subfolders or sorted(find_shards(root)) or [""]


def _scan_folder(root: Path, workers: int, progress: Progress | None) -> ImageIndex:
    class_names, paths, labels = _list_images(root)
    if not paths:
        state = "has no images" if any(root.iterdir()) else "is empty"
        raise DataError(f"got {root}, which {state}; {_LAYOUT} (any of {' '.join(IMG_EXTENSIONS)})")
    parts = [
        [os.path.join(root, path) for path in paths[i : i + _FILES_PER_TASK]]
        for i in range(0, len(paths), _FILES_PER_TASK)
    ]
    headers = [header for part in in_parallel(_inspect_all, parts, workers, progress) for header in part]
    folders = class_names if os.path.dirname(paths[0]) else ["."]
    return _build(
        root,
        class_names,
        paths,
        np.array(labels, dtype=np.int64),
        headers,
        stamps={name: _stamp(root / name) for name in folders},
    )


def _scan_shards(root: Path, files: list[Path], workers: int, progress: Progress | None) -> ImageIndex:
    found: list[tuple[int, Sample]] = []
    for shard, samples in enumerate(in_parallel(read_shard, [str(file) for file in files], workers, progress)):
        found += [(shard, sample) for sample in samples]
    if not found:
        raise DataError(f"got {root}, whose shards have no images; want <key>.jpg and <key>.cls in them")
    found.sort(key=lambda pair: (pair[1].label, pair[1].name, pair[0]))
    labels = np.array([sample.label for _, sample in found], dtype=np.int64)
    if labels[0] < 0:
        if labels[-1] >= 0:
            raise DataError(f"got shard {files[found[0][0]]}, where {found[0][1].name} has no label though others have")
        labels[:] = 0
        class_names = (root.resolve().name,)
    else:
        class_names = tuple(str(label) for label in range(labels.max() + 1))
    headers = [sample.header for _, sample in found]
    return _build(
        root,
        class_names,
        [sample.name for _, sample in found],
        labels,
        headers,
        stamps={file.name: _stamp(file) for file in files},
        shards=tuple(file.name for file in files),
        spans=np.array([(shard, s.offset) for shard, s in found], dtype=np.int64),
    )


def _build(root, class_names, names, labels, headers: list[Header], *, spans=None, **fields) -> ImageIndex:
    verdicts = np.array([header.verdict for header in headers], dtype=np.int16)
    is_damaged = (verdicts & Verdict.DAMAGED) != 0
    kept = np.flatnonzero(~is_damaged)
    return ImageIndex(
        root=root,
        paths=[names[i] for i in kept],
        labels=labels[kept],
        class_names=tuple(class_names),
        sizes=np.array([headers[i][:2] for i in kept], dtype=np.int32).reshape(-1, 2),
        damaged={names[i]: headers[i].reason for i in np.flatnonzero(is_damaged)},
        num_bytes=np.array([headers[i].num_bytes for i in kept], dtype=np.int64),
        verdicts=verdicts[kept],
        formats=np.array([headers[i].format for i in kept], dtype=str),
        modes=np.array([headers[i].mode for i in kept], dtype=str),
        spans=None if spans is None else spans[kept],
        **fields,
    )


Part, Result = TypeVar("Part"), TypeVar("Result")


def in_parallel(
    work: Callable[[Part], Result], parts: list[Part], workers: int, progress: Progress | None
) -> Iterator[Result]:
    """`work` of each part, in order, in processes: PIL's parsing of headers holds Python's lock."""
    watch = progress or (lambda results, total: results)
    if len(parts) == 1 or workers <= 1:
        yield from watch(map(work, parts), len(parts))
        return
    with ProcessPoolExecutor(min(workers, len(parts)), initializer=_end_with_parent) as pool:
        yield from watch(pool.map(work, parts), len(parts))


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: a pool's would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _inspect_all(paths: list[str]) -> list[Header]:
    return [inspect_path(path) for path in paths]


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
