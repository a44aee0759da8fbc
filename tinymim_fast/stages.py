"""Training programs one after another: what goes on is said on standard output, what the programs say in a log."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SHOWN_ON_FAILURE = 15  # lines of the log
STEP = re.compile(r"step (\d+)/(\d+) .*?\bloss (\S+)")
LOOK_S = 0.2  # between two looks at the log
PR_SET_PDEATHSIG = 1


class Stages:
    """What is going on, said on standard output: a numbered line a stage, and on a terminal its progress.

    Args:
        num_stages: of all.
    """

    def __init__(self, num_stages: int) -> None:
        self._number, self._num_stages = 0, num_stages
        self._live = sys.stdout.isatty()

    def begin(self, what: str) -> None:
        """Say what the next stage does."""
        self._number += 1
        self._quarters = 0
        self._line, self._began = f"[{self._number}/{self._num_stages}] {what}", time.monotonic()
        print(self._line, end=" ... " if self._live else "\n", flush=True)

    def progress(self, done: int, total: int, loss: str) -> None:
        """A bar on a terminal; elsewhere a line a quarter, so that a log is not full of bars."""
        where = f"step {done}/{total}, loss {loss}"
        if self._live:
            filled = 20 * done // total
            print(f"\r\033[K{self._line}  [{'#' * filled:.<20}] {where}", end="", flush=True)
        elif 4 * done // total > self._quarters:
            self._quarters = 4 * done // total
            print(f"      {where}", flush=True)

    def end(self, result: str = "") -> None:
        """Say what came of the stage and how long it took; on a terminal in the stage's own line."""
        start = f"\r\033[K{self._line}: " if self._live else "      "
        seconds = f"{time.monotonic() - self._began:.0f} s"
        print(start + (f"{result}, {seconds}" if result else seconds), flush=True)


def launch(stages: Stages, log: Path, launcher: Sequence[str], program: str, *flags: str) -> None:
    """`deepspeed LAUNCHER... tinymim_fast/PROGRAM FLAGS...`; its output goes to `log`, its progress to `stages`.

    An exception meanwhile, of a signal too, goes on as SIGTERM to the launcher and its ranks, which save. So does, on
    Linux, a kill of this process; the log is theirs, so that what they say then is in it.

    Args:
        stages: the stage has begun, and is ended here.
        log: appended to.
        launcher: flags of `deepspeed`.
        program: "train.py", "pretrain.py" or "finetune.py".
        *flags: of the program.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [str(Path(sys.executable).parent / "deepspeed"), *launcher, str(HERE / program), *flags]
    result, unread = "finished before", ""
    with open(log, "a", encoding="utf-8") as file, open(log, encoding="utf-8", errors="backslashreplace") as told:
        print("$", *command, file=file, flush=True)
        told.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C, too, reaches them by this process alone
            preexec_fn=end_with_parent,
        )
        try:
            ended = False
            while not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
                ended = process.returncode is not None
                lines, newline, unread = (unread + told.read()).rpartition("\n")
                for step in STEP.finditer(lines + newline):
                    stages.progress(int(step[1]), int(step[2]), step[3])
                    result = f"{step[2]} steps, loss {step[3]}"
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # they save, and the same command goes on from there
            process.wait()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    stages.end(result)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not loaded between fork and exec


def end_with_parent() -> None:
    """The launcher gets SIGTERM when the process that started it is gone; its ranks then notice, save and end."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def tell_failure(prog: str, what: str, error: subprocess.CalledProcessError, log: Path) -> int:
    """Say on standard error what failed, with the last lines of its log; gives its exit code as shells do."""
    last = log.read_text(encoding="utf-8", errors="backslashreplace").splitlines()[-SHOWN_ON_FAILURE:]
    code = error.returncode if error.returncode > 0 else 128 - error.returncode
    print(f"\n\n{prog}: {what} ended with code {code}. The last lines of {log}:\n", file=sys.stderr)
    print(*(f"  {line}" for line in last), sep="\n", file=sys.stderr)
    return code
