"""Stored bytes: of regular files alone, by plain reads; a memory map of a file that shrinks or fails would end the
process.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import numpy as np

from tinymim_fast.data.errors import DataError, ImageError


def open_regular(path: str | bytes) -> int:
    """A file descriptor for reading; a pipe or a device of that name is not waited for.

    Raises:
        OSError: it can't be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file")
    return descriptor


def read_file(path: str | bytes) -> np.ndarray:
    """(bytes,) uint8, a whole file.

    Raises:
        OSError: it can't be read, or became shorter while it was.
    """
    descriptor = open_regular(path)
    try:
        return _read_at(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, offset: int, num_bytes: int) -> np.ndarray:
    content = np.empty(num_bytes, dtype=np.uint8)
    done = 0
    while done < num_bytes:
        count = os.preadv(descriptor, [content[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"it ends after {offset + done} bytes")
        done += count
    return content


class ShardFiles:
    """Shards, opened when they are first read; a copy in another process opens its own.

    Args:
        root: folder of the shards.
        names: of the shards.
    """

    _MOST_OPEN = 256  # of the descriptors that a process may have, 1024 by default

    def __init__(self, root: str | Path, names: tuple[str, ...]):
        self.root, self.names = root, names
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # shard -> descriptor, the one opened first in front

    def __reduce__(self):
        return ShardFiles, (self.root, self.names)

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, shard: int, offset: int, num_bytes: int, name: str) -> np.ndarray:
        """(num_bytes,) uint8 at a position of a shard.

        Args:
            shard: position in `names`.
            offset: bytes.
            num_bytes: to read.
            name: of the image, for the message.

        Raises:
            DataError: the shard is missing or shorter than indexed; names it.
            ImageError: this part of it can't be read.
        """
        path = os.path.join(self.root, self.names[shard])
        try:
            descriptor = self._descriptor(shard, path)
        except OSError as error:
            raise DataError(
                f"got shard {path}, which can't be read: {error.strerror}; copy or pack it again"
            ) from error
        try:
            return _read_at(descriptor, offset, num_bytes)
        except OSError as error:
            size = os.fstat(descriptor).st_size
            if size < offset + num_bytes:
                raise DataError(
                    f"got shard {path} of {size} bytes, which ends before an indexed image: it is truncated; copy or "
                    f"pack it "
                    "again"
                ) from error
            raise ImageError(f"got {name} in {path}, which can't be read: {error.strerror}", error.strerror) from error
        finally:
            os.close(descriptor)

    def _descriptor(self, shard: int, path: str) -> int:
        """A duplicate of the shard's descriptor: another thread may close the original for want of room."""
        with self._lock:
            try:
                return self._duplicate(shard, path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                while self._open:
                    os.close(self._open.popitem()[1])
                return self._duplicate(shard, path)

    def _duplicate(self, shard: int, path: str) -> int:
        if shard not in self._open:
            if len(self._open) == self._MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = open_regular(path)
        return os.dup(self._open[shard])
