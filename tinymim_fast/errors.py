"""Errors that a user can mend, and the exit codes of the programs."""

EXIT_INPUT = 2  # bad flag, file or folder: nothing was written
EXIT_NON_FINITE = 3  # the loss became NaN or Inf
EXIT_TERMINATED = 75  # SIGTERM: saved; start the same command again to go on (EX_TEMPFAIL)


class InputError(ValueError):
    """A flag, file or folder that can't be used; the message names it and the way out."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or Inf; the message names the step, the rank and the last good checkpoint."""


class Terminated(Exception):
    """SIGTERM arrived; a checkpoint was saved."""
