"""Tar shards in webdataset's layout: `<key>.jpg` and `<key>.cls` side by side, read in any order through memory maps."""

from __future__ import annotations

import json
import mmap
import os
import resource
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinymim_fast.data.errors import DataError
from tinymim_fast.data.headers import IMG_EXTENSIONS, Header, inspect
from tinymim_fast.files import PREFIX

_BLOCK = 512  # bytes; zeros behind the last member end an archive


class Sample(NamedTuple):
    """One image of a shard: its name, label (-1 where there is none), position and size in bytes, and header."""

    name: str
    label: int
    offset: int
    header: Header


def read_shard(path: str) -> list[Sample]:
    """The images of one shard, in its order; only headers and labels are read.

    Raises:
        DataError: the shard is damaged or truncated, or a label is no integer; names the shard.
    """
    images: dict[str, list] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")  # webdataset's key ends at the first dot
                key = f"{folder}/{stem}"
                if f".{ending}".lower().endswith(IMG_EXTENSIONS):
                    images.setdefault(key, []).append((member.name, member.offset_data, inspect_member(tar, member)))
                elif ending in ("cls", "json"):
                    label = _label(tar.extractfile(member).read(), ending)
                    if label is not None:
                        labels[key] = label
            if os.path.getsize(path) < tar.offset + _BLOCK:  # tarfile takes a missing end for the end
                raise tarfile.ReadError("the end is missing")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"got shard {path}, which is damaged or truncated: {error}; copy or pack it again, or remove it"
        ) from error
    return [
        Sample(name, labels.get(key, -1), offset, header)
        for key, found in images.items()
        for name, offset, header in found
    ]


def inspect_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Header:
    """`inspect` of an image inside a shard."""
    with tar.extractfile(member) as file:
        return inspect(file, member.name)


def _label(content: bytes, ending: str) -> int | None:
    if ending == "cls":
        return int(content)
    described = json.loads(content)
    label = described.get("label", described.get("cls")) if isinstance(described, dict) else described
    return label if isinstance(label, int) else None


class ShardMaps:
    """Memory maps of shards, each made when it is first read; a copy in another process makes its own."""

    def __init__(self, root: str | Path, names: tuple[str, ...]):
        self.root, self.names = root, names
        self._maps: dict[int, np.ndarray] = {}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # Python keeps a file descriptor for each map
        wanted = soft + len(names)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )

    def __reduce__(self):
        return ShardMaps, (self.root, self.names)

    def view(self, shard: int, offset: int, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8 of a shard, read-only and without a copy.

        Raises:
            DataError: the shard is missing or shorter than indexed; names it.
        """
        whole = self._maps.get(shard)
        if whole is None:
            whole = self._maps[shard] = self._open(shard)
        found = whole[offset : offset + num_bytes]
        if len(found) != num_bytes:
            raise DataError(
                f"got shard {self._path(shard)} of {len(whole)} bytes, which ends before an indexed image: it is truncated; "
                "copy or pack it again"
            )
        return found

    def _path(self, shard: int) -> str:
        return os.path.join(self.root, self.names[shard])

    def _open(self, shard: int) -> np.ndarray:
        try:
            with open(self._path(shard), "rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DataError(
                f"got shard {self._path(shard)}, which can't be read: {error}; copy or pack it again"
            ) from error


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """The .tar files in a folder by split: train, val, or "" where their names tell none."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        if path.name.startswith(PREFIX):  # being packed, or left by a killed pack
            continue
        words = path.stem.replace("_", "-").split("-")
        split = next((s for s in ("train", "val") if s in words or (s == "val" and "validation" in words)), "")
        splits.setdefault(split, []).append(path)
    return splits
