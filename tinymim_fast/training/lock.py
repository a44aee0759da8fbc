"""One run in an output folder at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from tinymim_fast.errors import InputError

logger = logging.getLogger("tinymim_fast")
NAME = "run.lock"
PATIENCE_S = 5  # for a run that is just ending


class RunLock:
    """Held by rank 0 through `OUTPUT_DIR/run.lock`, which says which process holds it; the kernel releases it.

    A POSIX record lock: processes that are forked from the run don't hold it, and on NFS it holds between machines.

    Args:
        output_dir: of the run; need not exist yet.
        patience_s: how long to wait for one who holds it, seconds; None: `PATIENCE_S`.
    """

    def __init__(self, output_dir: Path, patience_s: float | None = None):
        self._path = output_dir / NAME
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object has taken it."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take it, if this isn't done and there is a folder.

        Raises:
            InputError: another run holds it; says which.
            OSError: the file can't be written.
        """
        if self.is_held or not self._path.parent.is_dir():
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                holder = os.read(descriptor, 4096).decode(errors="replace")
                os.close(descriptor)
                raise InputError(
                    f"{self._path.parent}: another run is training here ({_told(holder)}); stop it, or choose another "
                    "folder",
                    argument="output_dir",
                ) from None
            except OSError as error:
                logger.warning(
                    "%s: this file system has no locks (%s): see to it that one run uses it", self._path, error
                )
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another run have it; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _told(holder: str) -> str:
    try:
        return ", ".join(f"{key} {value}" for key, value in json.loads(holder).items())
    except (ValueError, AttributeError):
        return "which hasn't said who it is"
