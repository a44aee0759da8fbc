"""Errors that a user can mend, and the exit codes of the programs."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_INPUT = 2  # bad flag, file or folder: nothing was written
EXIT_NON_FINITE = 3  # the loss became NaN or Inf
EXIT_TERMINATED = 75  # SIGTERM: saved; start the same command again to go on (EX_TEMPFAIL)


def end_process(code: int) -> NoReturn:
    """End a program of several ranks with this code, after its exit hooks, and don't take the interpreter apart.

    A thread of gloo that frees a collective's tensor while the interpreter is taken apart aborts the process: SIGABRT,
    "terminate called without an active exception", in place of the exit code. It shows on busy cores only.
    """
    atexit._run_exitfuncs()  # as multiprocessing does before its own os._exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def printable(text: str) -> str:
    """`text`, of a hostile file's name, with what could move the cursor or break a line written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class InputError(ValueError):
    """An argument, file or folder that can't be used; the message names it and the way out.

    Args:
        message: what is wrong and what is wanted.
        argument: the argument at fault, by the name that the raising function gives it; put before the message. A
            program puts its flag in that place: see `flags`.
    """

    def __init__(self, message: str, *, argument: str | None = None):
        super().__init__(message)
        self.argument = argument

    def __str__(self) -> str:
        message = printable(super().__str__())
        return message if self.argument is None else f"{self.argument}: {message}"


@contextmanager
def flags(**names: str) -> Iterator[None]:
    """Errors from inside the with block name a program's flag instead of a library's argument.

    `with flags(source="--teacher-checkpoint"):` turns "source: no such file" into "--teacher-checkpoint: no such file".
    """
    try:
        yield
    except InputError as error:
        error.argument = names.get(error.argument, error.argument)
        raise


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or Inf; the message names the step, the rank and the last good checkpoint."""


class Terminated(Exception):
    """SIGTERM arrived; a checkpoint was saved."""


class DataLate(Exception):
    """A batch was waited for too long, by the rule of whoever waits."""
