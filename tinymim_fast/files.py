"""Whole or not at all: a file or folder has its name only when all of it is on the disk.

It is made under a temporary name beside the target (`tmp_*`, on the same file system), synced, renamed, and the folder
that holds it is synced, so that neither a kill nor a power cut leaves half of it under its name.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("tinymim_fast")
PREFIX = "tmp_"
CHECKSUMS = "SHA256SUMS"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, with the target's suffix; it becomes `path` at the end of the with block.

    An exception inside leaves `path` as it was.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty temporary folder to fill; it becomes `path`, which must be empty or missing, as the with block ends.

    An exception inside leaves nothing behind. The current folder stays the same one, since a shell stands in it: what
    was made is moved into it, one name after the other.

    Raises:
        OSError: the folder can't be written, or `path` holds something.
    """
    path = Path(path).absolute()
    stay = path.is_dir() and path.samefile(os.curdir)
    temporary = _beside(path / path.name) if stay else _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(os.path.join(folder, name))
            _sync(folder)
        if stay:
            if len(os.listdir(path)) > 1:
                raise FileExistsError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            for made in sorted(temporary.iterdir()):
                os.rename(made, path / made.name)
            _sync(path)
        else:
            os.rename(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """`text` as the whole content of `path`, in UTF-8.

    Raises:
        OSError: the file can't be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(path: str | Path) -> None:
    """Remove a folder under a temporary name first, so that a kill leaves nothing half there under its own.

    Raises:
        OSError: it can't be removed; what is left of it has a temporary name.
    """
    path = Path(path)
    temporary = _beside(path)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes left in `folder` under temporary names; nobody may be writing there.

    Raises:
        OSError: something can't be removed.
    """
    for path in Path(folder).glob(PREFIX + "*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside(path: str | Path) -> Path:
    """Give what stands in the way another name, which it returns: nothing of a user's is removed."""
    path = Path(path)
    other = path.with_name(f"aside_{path.name}_{secrets.token_hex(4)}")
    os.rename(path, other)
    logger.warning("%s is not what should be there; it is called %s now", path, other.name)
    return other


def free_mib(folder: str | Path) -> int:
    """Free space, MiB, of the file system that `folder` is or would be on."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free >> 20


def write_checksums(folder: str | Path) -> None:
    """`folder/SHA256SUMS`, a line for each file in it: what `sha256sum --check SHA256SUMS` reads.

    Raises:
        OSError: a file can't be read, or the list can't be written.
    """
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    write_text(Path(folder) / CHECKSUMS, "".join(f"{sha256(Path(folder) / name)}  {name}\n" for name in names))


def differing(folder: str | Path) -> list[str]:
    """Names in `folder/SHA256SUMS` whose files are missing or others; the list's own name where it can't be read.

    Without a list there is nothing to differ from.
    """
    try:
        listed = listed_checksums(folder)
    except (OSError, ValueError):
        return [CHECKSUMS]
    return [name for name, digest in listed.items() if _sha256_or_none(Path(folder) / name) != digest]


def listed_checksums(folder: str | Path) -> dict[str, str]:
    """Digest by name in `folder/SHA256SUMS`; empty where there is no list.

    Raises:
        OSError: it can't be read.
        ValueError: it holds something else.
    """
    path = Path(folder) / CHECKSUMS
    if not path.exists():
        return {}
    listed = {name: digest for digest, name in (x.split("  ", 1) for x in path.read_text("utf-8").splitlines())}
    if not listed:
        raise ValueError(f"{path}: is empty")
    return listed


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sha256_or_none(path: Path) -> str | None:
    try:
        return sha256(path)
    except OSError:
        return None


def _beside(path: Path) -> Path:
    return path.with_name(f"{PREFIX}{secrets.token_hex(4)}_{path.name}")


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
