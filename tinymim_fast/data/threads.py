"""Threads that read, and a wait for them that can be given up: a disk or a network share may never answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

LOOK_S = 1.0  # between two calls of `waiting`
Value = TypeVar("Value")


class Readers(ThreadPoolExecutor):
    """A pool of threads.

    Args:
        num_threads: at least one.
        waiting: called about once a second while `result` waits; what it raises ends the wait.

    Attributes:
        is_late: a result is being waited for, or was given up.
    """

    def __init__(self, num_threads: int, waiting: Callable[[], None]):
        super().__init__(num_threads, "tinymim_fast")
        self._waiting = waiting
        self.is_late = False

    def result(self, future: Future[Value]) -> Value:
        """What a task of this pool gives."""
        while wait([future], LOOK_S).not_done:
            self.is_late = True
            self._waiting()
        self.is_late = False
        return future.result()

    def close(self) -> None:
        """End the threads, and wait for it; one that was given up is left behind."""
        self.shutdown(wait=not self.is_late, cancel_futures=True)
