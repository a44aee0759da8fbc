"""A training program: parse, train, and turn what went wrong into one line and an exit code."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tinymim_fast.config import RunConfig, name_flags, parse
from tinymim_fast.errors import (
    EXIT_INPUT,
    EXIT_NON_FINITE,
    EXIT_TERMINATED,
    InputError,
    NonFiniteLossError,
    Terminated,
)
from tinymim_fast.training.stop import StopRequests

logger = logging.getLogger("tinymim_fast")
# What gloo and NCCL say when a rank is gone.
LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exited|ncclRemoteError|Timed out waiting")
EXIT_CODES = {InputError: EXIT_INPUT, NonFiniteLossError: EXIT_NON_FINITE, Terminated: EXIT_TERMINATED}


def main(kind: type[RunConfig], build_task: Callable[..., Any], argv: Sequence[str] | None, prog: str) -> int:
    """Run a training program.

    Args:
        kind: the configuration's class, whose fields are the flags.
        build_task: see `loop.train`.
        argv: the command line without the program's name; None: this process's.
        prog: the program's name, for messages.

    Returns:
        The exit code, 0 for a run that is done: see `errors`.
    """
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    stop = StopRequests()
    try:
        stop.take_signals(prog)
        _run(kind, build_task, sys.argv[1:] if argv is None else argv, prog, stop)
        return 0
    except Exception as error:
        ended = _as_ended(error, stop)
        if ended is None:
            raise
        if rank != "0":
            time.sleep(3)  # rank 0 most likely says the same, and its exit makes the launcher end this process
        print(f"{prog}: {ended}", file=sys.stderr, flush=True)
        code = next(code for kind_of_error, code in EXIT_CODES.items() if isinstance(ended, kind_of_error))
        if stop.late_s:  # a thread that hangs in a read would be waited for
            os._exit(code)
        return code
    finally:
        stop.ignore_signals()


def _run(
    kind: type[RunConfig], build_task: Callable[..., Any], argv: Sequence[str], prog: str, stop: StopRequests
) -> None:
    config = parse(kind, argv, prog)

    from tinymim_fast import engine  # after --help and bad flags, which need not wait for torch and DeepSpeed
    from tinymim_fast.training import loop

    with name_flags(kind):
        world = engine.start()
        try:
            loop.train(config, world, build_task, stop)
        finally:
            engine.stop()


def _as_ended(error: Exception, stop: StopRequests) -> Exception | None:
    """The error to tell in one line, one of `EXIT_CODES`; None for one that nobody expects."""
    if isinstance(error, tuple(EXIT_CODES)):
        return error
    line = " ".join(str(error).split())[:200]
    last = f"the last checkpoint is {stop.last_checkpoint}, and the same command continues"
    if (
        stop.reason is not None
    ):  # the signal reached what this process waited for, too: a rank, or one that reads images
        return Terminated(f"stopped by {stop.reason}, without saving ({line}); {last}")
    if isinstance(error, RuntimeError) and LOST.search(line):
        return Terminated(f"another rank ended or can't be reached, see the launcher's report ({line}); {last}")
    return None
