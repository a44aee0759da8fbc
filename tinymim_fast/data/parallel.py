"""Work in processes, in order, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tinymim_fast.data.errors import DataError

Progress = Callable[[Iterable, int], Iterable]  # tqdm's shape: (parts, total)
Part, Result = TypeVar("Part"), TypeVar("Result")


def in_parallel(
    work: Callable[[Part], Result], parts: list[Part], workers: int, progress: Progress | None
) -> Iterator[Result]:
    """`work` of each part, in order, in processes: PIL's parsing of headers holds Python's lock.

    Args:
        work: a function that a process can be sent.
        parts: what it is called with.
        workers: processes; none is started for one part or one worker.
        progress: wraps the results, as tqdm does.

    Raises:
        DataError: a process was ended from outside.
    """
    watch = progress or (lambda results, total: results)
    if len(parts) == 1 or workers <= 1:
        yield from watch(map(work, parts), len(parts))
        return
    try:
        with ProcessPoolExecutor(min(workers, len(parts)), initializer=_end_with_parent) as pool:
            yield from watch(pool.map(work, parts), len(parts))
    except BrokenProcessPool as error:
        raise DataError(
            f"got {workers} processes, one of which was killed, for want of memory most likely; try fewer",
            argument="workers",
        ) from error


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: a pool's would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
