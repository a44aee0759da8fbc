"""What the other ranks do, as each tells the store of the process group every second: who is waited for, who is gone.

A collective that waits for a rank doesn't say for which. PyTorch's `monitored_barrier` does, but is a barrier more, and
only where all ranks call it; here a rank tells from a thread, whatever it hangs in, and is asked when it is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from tinymim_fast.distributed import World

BEAT_S = 1.0  # between two signs of life
LOOK_AFTER_S = 5.0  # of doing the same, the others are looked at with each sign
SILENT_S = 15.0  # without a sign: a busy machine may hold a thread up for seconds
ENDED = "ended: "


class Peers:
    """The ranks beside this one. Collective: all ranks make theirs.

    Args:
        world: the ranks.
        doing: what this rank does, and since when, by `time.monotonic`.
        same: what counts as nothing special, as ranks that wait for another one do.
    """

    def __init__(self, world: World, doing: Callable[[], tuple[str, float]], same: str):
        self._world, self._doing, self._same = world, doing, same
        self._others = [rank for rank in range(world.world_size) if rank != world.rank]
        self._number, self._is_asked = 0, False
        self._answered_at = time.monotonic()
        self._signs: dict[int, dict[str, Any]] = {}
        self._changed_at: dict[int, float] = {}
        self._over = threading.Event()
        self._tell()
        place = f"{socket.gethostname()} {_namespace()}"
        told = world.gather((place, os.getpid()))  # and so all have told the store
        self._neighbours = {rank: told[rank][1] for rank in self._others if told[rank][0] == place}
        if self._others:
            threading.Thread(target=self._tell_and_look, daemon=True).start()

    def late(self) -> dict[int, str]:
        """Ranks that keep this one waiting, with why: no sign of life, or something else than a step."""
        now = time.monotonic()
        if self._world.rank and now - self._answered_at > SILENT_S:
            return {0: f"the store that it holds gave no answer for {now - self._answered_at:.0f} s"}
        found = {}
        for rank, sign in list(self._signs.items()):
            silence = now - self._changed_at[rank]
            if silence > SILENT_S:
                found[rank] = f"no sign of life for {silence:.0f} s"
            elif sign["doing"] != self._same:
                found[rank] = f"{sign['doing']} for {sign['for_s'] + silence:.0f} s"
        return found

    def silent_s(self) -> float:
        """The longest time for which a rank, or the store, has given no sign of life, as far as it was looked for."""
        waits = [time.monotonic() - at for at in self._changed_at.values()]
        return max([0.0, time.monotonic() - self._answered_at, *waits]) if self._others else 0.0

    def lost(self, patience_s: float = 6.0) -> dict[int, str]:
        """Ranks that ended, or ended most likely, with why; looks for so long where none has said so."""
        deadline = time.monotonic() + patience_s if self._others else 0.0
        while time.monotonic() < deadline:
            found = {rank: f"process {n} is gone" for rank, n in self._neighbours.items() if not _is_alive(n)}
            ended = {rank: sign["doing"] for rank, sign in list(self._signs.items())}
            found |= {rank: doing.removeprefix(ENDED) for rank, doing in ended.items() if doing.startswith(ENDED)}
            if found:
                self._over.set()  # nothing is asked of a store that may be gone with it
                return found
            self._is_asked = True
            time.sleep(0.1)
        now = time.monotonic()
        if self._world.rank and now - self._answered_at > patience_s / 2:
            return {0: "the store that it holds is gone"}
        return {rank: "no sign of life" for rank, at in self._changed_at.items() if now - at > patience_s / 2}

    def tell_end(self, why: str) -> None:
        """This rank ends; the others may say why."""
        self._over.set()
        if self._has_store:
            with contextlib.suppress(RuntimeError):
                self._tell(ENDED + why)

    @property
    def _has_store(self) -> bool:
        """False where rank 0, on this machine, is gone: PyTorch reports each question to its store at length."""
        return 0 not in self._neighbours or _is_alive(self._neighbours[0])

    def _tell_and_look(self) -> None:
        while not self._over.wait(BEAT_S) and self._has_store:
            with contextlib.suppress(RuntimeError):  # the store is gone
                self._tell()
                if self._is_asked or time.monotonic() - self._doing()[1] > LOOK_AFTER_S:
                    self._look()
                self._answered_at = time.monotonic()

    def _tell(self, what: str | None = None) -> None:
        self._number += 1
        doing, since = self._doing()
        sign = {
            "number": self._number,
            "doing": what or doing,
            "for_s": round(time.monotonic() - since, 1),
        }
        self._world.store.set(f"sign_of_life/{self._world.rank}", json.dumps(sign))

    def _look(self) -> None:
        told = self._world.store.multi_get([f"sign_of_life/{rank}" for rank in self._others])
        for rank, text in zip(self._others, told, strict=True):
            sign = json.loads(text)
            if rank not in self._signs or sign["number"] != self._signs[rank]["number"]:
                self._changed_at[rank] = time.monotonic()
            self._signs[rank] = sign


def _namespace() -> str:
    """Process numbers mean the same only within one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
