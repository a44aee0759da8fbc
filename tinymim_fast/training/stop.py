"""What asks a run to stop before its end, and the thread that sees to it that it does, whatever it hangs in.

A signal is taken at once while the run starts, and at the end of a step once it trains, when all ranks have agreed
to stop, save and end. Python handles signals between its own instructions only: a thread that reads the wake-up pipe
ends a process that a signal can't reach, because it waits for data, for another rank, or in a library.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.errors import EXIT_TERMINATED, DataLate, Terminated

if TYPE_CHECKING:  # --help does not wait for torch
    from tinymim_fast.training.peers import Peers

logger = logging.getLogger("tinymim_fast")
# A launcher's, Ctrl-C, SLURM's warning before the time limit, a terminal that is closed. One that is ignored stays so.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_TIME = "max_time"
MAX_WAIT = "max_wait"
ORPHANED = "the end of its launcher"
REASONS = (*(number.name for number in SIGNALS), MAX_TIME, MAX_WAIT, ORPHANED)
TRAINING, WAITING = "training", "waiting for data"
SAY_S = 60  # of waiting for data
LOOK_S = 1.0  # between two looks at the launcher
WAIT_S = 10  # for data or at the start, after a signal
GIVE_UP_S = 10  # more, for the process to give up waiting for data by itself
STEP_S = 120  # of a step, or of a batch of validation, that doesn't end, after a signal


class StopRequests:
    """Why this process should stop, if it should: the time limit; a signal, after `take_signals`.

    Attributes:
        reason: one of `REASONS`; None while there is none.
        last_checkpoint: to be told by a process that ends without saving.
        late_s: seconds that data was waited for before this process gave up; 0: it didn't.
        peers: the other ranks, once there are any.
        divided: why one rank can't save without another, to be told; "" where it can.
    """

    def __init__(self):
        self.reason: str | None = None
        self.last_checkpoint = "none"
        self.late_s = 0.0
        self.peers: Peers | None = None
        self.divided = ""
        self._launcher = Launcher()
        self._began = time.monotonic()
        self._max_s, self._max_wait_s = 0.0, 0.0
        self._doing, self._doing_since = "starting", self._began
        self._asked_at = 0.0  # when there was a reason first

    def take_signals(self, prog: str) -> None:
        """Take `SIGNALS` from now on until the process ends: none of them changes the exit code any more.

        Args:
            prog: the program's name, for messages.
        """
        self._pid = os.getpid()
        pipe = os.pipe()
        for end in pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(prog, pipe[0]), daemon=True).start()

    def ignore_signals(self) -> None:
        """The run is over: while Python shuts down, which puts its own handlers away, signals do nothing."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def code(self) -> int:
        """0, or a number for why this process wants to stop, for `reason_of`; larger ones win where ranks differ."""
        if self.reason is None and self._launcher.is_gone:
            self._stop_for(ORPHANED)
        if self.reason is None and self._max_s and time.monotonic() - self._began > self._max_s:
            self._stop_for(MAX_TIME)
        return 0 if self.reason is None else 1 + REASONS.index(self.reason)

    def start_training(self, max_minutes: float, max_wait_minutes: float) -> None:
        """From now on signals wait for the end of the step.

        Args:
            max_minutes: time limit, counted from the making of this object; 0: none.
            max_wait_minutes: longest wait for one micro-batch, after which the run saves and ends; 0: any.

        Raises:
            Terminated: a signal came meanwhile.
        """
        self._max_s, self._max_wait_s = 60 * max_minutes, 60 * max_wait_minutes
        self.now(TRAINING)
        if self.reason is not None:
            raise self.terminated_at_start()

    def look_while_waiting(self) -> None:
        """Called about once a second while data is waited for, which is given up after `max_wait` or a signal.

        Raises:
            DataLate: it is.
        """
        now = time.monotonic()
        waited = now - self._doing_since
        if self.reason is None and self._max_wait_s and waited > self._max_wait_s:
            self._stop_for(MAX_WAIT)
        elif not self.code or now - max(self._asked_at, self._doing_since) < WAIT_S:
            return
        self.late_s = waited
        raise DataLate

    def now(self, what: str) -> None:
        """The run begins to do this: `TRAINING`, "validating", "saving" or `WAITING`."""
        self._doing, self._doing_since = what, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The run does this inside the with block."""
        before = self._doing
        self.now(what)
        try:
            yield
        finally:
            self.now(before)

    def state(self) -> tuple[str, float]:
        """What the run does, and since when, by `time.monotonic`."""
        return self._doing, self._doing_since

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.reason is None:
            self._stop_for(signal.Signals(signum).name)
            if self._doing == "starting":
                raise self.terminated_at_start()

    def _stop_for(self, reason: str) -> None:
        self.reason, self._asked_at = reason, time.monotonic()

    def terminated_at_start(self) -> Terminated:
        """What to raise where no step was taken yet."""
        return Terminated(f"stopped by {self.reason} before the first step; the same command starts again")

    def _leave_to_parent(self) -> None:
        """In a forked process, which is not the run: signals do there what they do by default."""
        if os.getpid() == self._pid or signal.getsignal(signal.SIGTERM) != self._on_signal:
            return
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self, prog: str, wakeups: int) -> None:
        """After a signal, or after too long a wait, end a process that doesn't; in a thread of its own."""
        asked_at, name, told_at = None, "", 0.0
        while True:
            if select.select([wakeups], [], [], 1.0)[0]:
                numbers = [n for n in os.read(wakeups, 4096) if n in SIGNALS]
                if numbers and asked_at is None:
                    asked_at, name = time.monotonic(), signal.Signals(numbers[0]).name
            doing, since = self.state()
            waited = time.monotonic() - since
            if asked_at is not None and doing != "saving":
                limits = {TRAINING: STEP_S, "validating": STEP_S, WAITING: WAIT_S + GIVE_UP_S}
                limit = limits.get(doing, WAIT_S)
                if time.monotonic() - max(asked_at, since) > limit:
                    self._end(f"{prog}: stopped by {name} after {limit} s of {doing}")
            late = self.peers.late() if doing == TRAINING and self.peers is not None else {}
            limit = self._max_wait_s + GIVE_UP_S if self._max_wait_s else math.inf
            if doing == WAITING and waited > limit:
                self._end(f"{prog}: stopped after {waited:.0f} s of waiting for data, more than max_wait allows")
            if late and min(waited, self.peers.silent_s()) > limit:
                why = f"waiting for {named(late)}, more than max_wait allows{self.divided}"
                self._end(f"{prog}: stopped after {waited:.0f} s of {why}")
            if waited > SAY_S and since != told_at and (late or doing == WAITING):
                logger.warning("%s for %.0f s", f"waiting for {named(late)}" if late else WAITING, waited)
                told_at = since

    def _end(self, why: str) -> None:
        print(
            f"{why}, without saving; the last checkpoint is {self.last_checkpoint}, and the same command continues",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_TERMINATED)


class Launcher:
    """The processes of `torchrun` or `deepspeed` above this one, none if neither started it: a shell may end."""

    def __init__(self):
        self._looked_at = time.monotonic()
        self._gone = False
        parent = os.getppid()
        self._parents = [parent]  # above this process
        if "deepspeed" in _command(parent):  # its launch.py, below `deepspeed`
            self._parents.append(_parent_of(parent))
        elif "TORCHELASTIC_RUN_ID" not in os.environ:
            self._parents = []

    @property
    def is_gone(self) -> bool:
        """Whether one of them has ended; looked up once a second at most."""
        if self._parents and not self._gone and time.monotonic() - self._looked_at > LOOK_S:
            self._looked_at = time.monotonic()
            process = os.getpid()
            for parent in self._parents:
                self._gone |= _parent_of(process) != parent
                process = parent
        return self._gone


def _parent_of(process: int) -> int | None:
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def named(ranks: dict[int, str]) -> str:
    """ "rank 1 (no sign of life for 70 s), rank 3 (...)"."""
    return ", ".join(f"rank {rank} ({why})" for rank, why in sorted(ranks.items()))


def reason_of(code: int) -> str:
    """What a rank's `StopRequests.code` stands for."""
    return REASONS[code - 1]
