"""The table of a data set's images, with labels and stored sizes, and its file: one .npz for all splits."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim_fast.data.decode import decode_rgb
from tinymim_fast.data.errors import DataError, ImageError, name_some
from tinymim_fast.data.stored import ShardFiles, read_file
from tinymim_fast.files import whole_file

INDEX_FILE = "index.npz"
_FORMAT = "tinymim_fast image index 2"
_ARRAYS = ("num_bytes", "verdicts", "spans")  # that an index may lack
_NAMES = ("root", "paths", "class_names", "damaged", "reasons", "shards", "stamped")  # of packed arrays in the file


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
    shards: tuple[str, ...] = ()
    spans: np.ndarray | None = None
    stamps: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_listed(self) -> int:
        """Images found, those left out included."""
        return len(self.paths) + len(self.damaged)

    @property
    def is_labelled(self) -> bool:
        """Whether the images have classes; not where they lie directly in a folder, or in shards without labels."""
        return any("/" in path for path in self.paths[:1]) or self.class_names != (self.root.resolve().name,)

    def file(self, sample_id: int) -> str:
        """The full path of one sample, or its shard and its name in it."""
        if self.shards:
            return f"{os.path.join(self.root, self.shards[self.spans[sample_id, 0]])}: {self.paths[sample_id]}"
        return os.path.join(self.root, self.paths[sample_id])

    def encoded(self, sample_id: int) -> np.ndarray:
        """(bytes,) uint8, the stored file of a sample.

        Raises:
            ImageError: the file can't be read; names it.
            DataError: the shard is missing or truncated; names it.
        """
        if self.shards:
            shard, offset = self.spans[sample_id].tolist()
            return self._shard_files.read(shard, offset, int(self.num_bytes[sample_id]), self.paths[sample_id])
        try:
            return read_file(self.file(sample_id))
        except OSError as error:
            raise ImageError(
                f"got {self.file(sample_id)}, which can't be read: {error.strerror}", error.strerror
            ) from error

    @cached_property
    def _shard_files(self) -> ShardFiles:
        return ShardFiles(self.root, self.shards)

    def read_image(self, sample_id: int) -> Image.Image:
        """Read and decode one sample: see `decode`.

        Raises:
            ImageError: the file is missing or damaged, or no longer has the indexed size; names it.
            DataError: its shard is missing or truncated; names it.
        """
        return self.decode(sample_id, self.encoded(sample_id))

    def decode(self, sample_id: int, encoded: np.ndarray) -> Image.Image:
        """The bytes of one sample to RGB.

        Raises:
            ImageError: they are damaged, or no longer an image of the indexed size; names the file.
        """
        height, width = self.sizes[sample_id].tolist()
        return decode_rgb(BytesIO(encoded), self.file(sample_id), (height, width))

    def subset(self, sample_ids: np.ndarray) -> ImageIndex:
        """Some of the images, in the order given; `damaged` and `stamps` stay."""
        arrays = {name: getattr(self, name) for name in ("labels", "sizes", *_ARRAYS)}
        return replace(
            self,
            paths=[self.paths[i] for i in sample_ids],
            **{name: None if array is None else array[sample_ids] for name, array in arrays.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write this index alone to `path`: see `save_indexes`."""
        save_indexes(path, {"": self}, home=self.root)

    @classmethod
    def load(cls, path: str | Path) -> ImageIndex:
        """Read what `save` wrote: see `load_index`."""
        return load_index(path)


def save_indexes(path: str | Path, splits: dict[str, ImageIndex], *, home: Path) -> None:
    """Write the splits of one data set to `path` (.npz), whole or not at all.

    Args:
        path: the file.
        splits: index by split; "" for a data set without splits.
        home: folder of the data set, which holds each `root`.
    """
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
        for name in _ARRAYS:
            if getattr(index, name) is not None:
                own[name] = getattr(index, name)
        arrays |= {f"{split}/{name}": array for name, array in own.items()}
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_index(path: str | Path, split: str | None = None, *, home: Path | None = None) -> ImageIndex:
    """Read one split of what `save_indexes` wrote.

    Args:
        path: the file.
        split: which; a file without splits holds "train". None: the only one.
        home: where the data set lies now; by default where it was scanned.

    Raises:
        DataError: `path` is missing or holds something else, not this split, or names and positions that no scan gives.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed arrays")  # which may unpack to any size; none is written
        with np.load(path, allow_pickle=False) as data:
            if str(data["format"]) != _FORMAT:
                raise KeyError("format")
            names = _unpack(data["splits"])
            found = names[0] if len(names) == 1 and (split is None or (names == [""] and split == "train")) else split
            if found not in names:
                have = ", ".join(name or "no splits" for name in names)
                raise DataError(
                    f"got {path}, which holds {have}; want {split or 'one split'}: scan a folder that has it"
                )
            text = {name: _unpack(data[f"{found}/{name}"]) for name in _NAMES}
            arrays = {name: data[f"{found}/{name}"] for name in _ARRAYS if f"{found}/{name}" in data.files}
            index = ImageIndex(
                root=Path(os.path.normpath(os.path.join(home or _unpack(data["home"])[0], _inside(text["root"][0])))),
                paths=text["paths"],
                class_names=tuple(text["class_names"]),
                damaged=dict(zip(text["damaged"], text["reasons"])),
                shards=tuple(text["shards"]),
                labels=data[f"{found}/labels"],
                sizes=data[f"{found}/sizes"],
                stamps=dict(zip(text["stamped"], data[f"{found}/stamps"].tolist())),
                **arrays,
            )
        _check(index)
        return index
    except DataError:
        raise
    except Exception as error:  # a foreign file may raise anything
        raise DataError(
            f"got {path}, want an image index written by python -m tinymim_fast.data.scan: "
            f"{error or type(error).__name__}"
        ) from error


def _check(index: ImageIndex) -> None:
    """What a loader relies on.

    Raises:
        ValueError: an array of another length or kind, a position or a label that nothing has, a path that leaves the
            data set.
    """
    n = len(index)
    shapes = {"labels": (n,), "sizes": (n, 2), "num_bytes": (n,), "verdicts": (n,), "spans": (n, 2)}
    for name, shape in shapes.items():
        array = getattr(index, name)
        if array is not None and (array.shape != shape or array.dtype.kind not in "iu"):
            raise ValueError(f"{name} of {array.dtype} {array.shape}, want integers {shape}")
    if n and not (index.labels.min() >= 0 and index.labels.max() < len(index.class_names)):
        raise ValueError(f"labels {index.labels.min()} to {index.labels.max()} for {len(index.class_names)} classes")
    if n and index.sizes.min() < 1:
        raise ValueError("images without pixels")
    for path in (*index.paths, *index.shards, *index.stamps):
        _inside(path)
    if index.shards:
        if index.spans is None or index.num_bytes is None:
            raise ValueError("no positions in its shards")
        if n and not (
            index.spans.min() >= 0 and index.spans[:, 0].max() < len(index.shards) and index.num_bytes.min() > 0
        ):
            raise ValueError("positions outside its shards")


def _inside(path: str) -> str:
    """The path, which stays in the folder that it is relative to."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path}, which leaves the data set's folder")
    return path


def _pack(names: Iterable[str]) -> np.ndarray:
    """Names as one zero-separated byte string: no padding to the longest, any file name survives."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), dtype=np.uint8)


def _unpack(packed: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in packed.tobytes().split(b"\0")[:-1]]


def check_stamps(index: ImageIndex, file: Path) -> list[str]:
    """Which class folders changed since the scan, so that new files in them are missed.

    Raises:
        DataError: the index, read from `file`, lists images where no folder is, or shards that changed.
    """
    if not index.root.is_dir():
        raise DataError(f"got {file}, which lists images of {index.root}, which is no folder; scan where they are now")
    changed = [name for name, stamp in index.stamps.items() if stamp_of(index.root / name) != stamp]
    if changed and index.shards:
        raise DataError(
            f"got shards in {index.root} that are missing, truncated or changed since the scan: {name_some(changed)}; "
            "copy or pack them again, or scan again"
        )
    return changed


def stamp_of(path: Path) -> int | None:
    """Modification time of a folder in ns, size of a file in bytes; None where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns if path.is_dir() else found.st_size
