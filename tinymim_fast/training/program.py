"""A training program: parse, train, and turn what went wrong into one line and an exit code."""

from __future__ import annotations

import logging
import os
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

logger = logging.getLogger("tinymim_fast")
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
    try:
        config = parse(kind, sys.argv[1:] if argv is None else argv, prog)

        from tinymim_fast import engine  # after --help and bad flags, which need not wait for torch and DeepSpeed
        from tinymim_fast.training import loop

        with name_flags(kind):
            world = engine.start()
            try:
                loop.train(config, world, build_task)
            finally:
                engine.stop()
    except tuple(EXIT_CODES) as stopped:
        if rank != "0":
            time.sleep(3)  # rank 0 most likely says the same, and its exit makes the launcher end this process
        print(f"{prog}: {stopped}", file=sys.stderr, flush=True)
        return next(code for error, code in EXIT_CODES.items() if isinstance(stopped, error))
    return 0
