"""A training program: parse, train, and turn what went wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tinymim_fast.config import RunConfig, name_flags, parse
from tinymim_fast.errors import (
    EXIT_INPUT,
    EXIT_NON_FINITE,
    EXIT_TERMINATED,
    InputError,
    NonFiniteLossError,
    Terminated,
)
from tinymim_fast.training.stop import StopRequests, named

if TYPE_CHECKING:
    from tinymim_fast.distributed import World

logger = logging.getLogger("tinymim_fast")
SAID = "said"  # the store's key for rank 0's last line
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
    stop, world = StopRequests(), None
    try:
        stop.take_signals(prog)
        config = parse(kind, sys.argv[1:] if argv is None else argv, prog)

        from tinymim_fast import engine  # after --help and bad flags, which need not wait for torch and DeepSpeed
        from tinymim_fast.training import loop

        with name_flags(kind):
            world = engine.start(config.max_wait)
            loop.train(config, world, build_task, stop)
        engine.stop(world)
        return 0
    except Exception as error:
        ended, together = _as_ended(error, stop)
        if ended is not None:
            _tell(f"{prog}: {ended}", world, once=isinstance(ended, InputError))
        if stop.peers is not None:
            stop.peers.tell_end(" ".join(str(ended or repr(error)).split())[:200])
        if world is not None:
            engine.stop(world if together else None)
        if ended is None:
            raise
        return next(code for kind_of_error, code in EXIT_CODES.items() if isinstance(ended, kind_of_error))
    finally:
        stop.ignore_signals()


def _as_ended(error: Exception, stop: StopRequests) -> tuple[Exception | None, bool]:
    """The error to tell in one line, one of `EXIT_CODES`, None for one that nobody expects; whether all may have it."""
    if isinstance(error, tuple(EXIT_CODES)):
        return error, True
    if not isinstance(error, RuntimeError):
        return None, False
    from tinymim_fast.distributed import rank_was_lost

    was_lost = rank_was_lost(error)
    if not was_lost and stop.reason is None:
        return None, False
    lost = stop.peers.lost() if was_lost and stop.peers is not None else {}
    names = f": {named(lost)}" if lost else ""
    line = " ".join(str(error).split())[:200]
    last = f"the last checkpoint is {stop.last_checkpoint}, and the same command continues"
    if stop.reason is not None:  # the signal reached what this process waited for, too: a rank, or one that reads
        return Terminated(f"stopped by {stop.reason}, without saving{names} ({line}); {last}"), False
    message = f"another rank ended or can't be reached{names}, see the launcher's report ({line}){stop.divided}; {last}"
    return Terminated(message), False


def _tell(line: str, world: World | None, *, once: bool) -> None:
    """Print a line; where rank 0 says the same within 3 s, only rank 0 does, if `once`."""
    if world is None:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # rank 0's exit makes the launcher end this process
    elif once and not world.is_main:
        with contextlib.suppress(RuntimeError):  # of the store: it is gone, or rank 0 says nothing
            world.store.wait([SAID], timedelta(seconds=3))
            if world.store.get(SAID).decode() == line:
                return
    print(line, file=sys.stderr, flush=True)
    if once and world is not None and world.is_main:
        with contextlib.suppress(RuntimeError):
            world.store.set(SAID, line)
