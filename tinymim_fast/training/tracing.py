"""A trace of some steps that Perfetto opens, with the ranges data, teacher, student, loss, backward and optimizer."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from tinymim_fast.files import whole_file

logger = logging.getLogger("tinymim_fast")
WARM_UP = 5  # steps before: compiling, allocating, filling of queues


class Tracer:
    """Traces `num_steps` optimizer steps after `WARM_UP` of this start, and writes `trace.json.gz` into `folder`.

    Args:
        folder: of the run; exists when the trace ends.
        num_steps: 0 traces none.
    """

    def __init__(self, folder: Path, num_steps: int):
        self._path = folder / "trace.json.gz"
        self._num_steps = num_steps
        self._done = 0
        self._profile: profile | None = None

    def after_step(self) -> None:
        """Once after each optimizer step; the one that ends the trace waits for the device and writes the file."""
        if not self._num_steps:
            return
        self._done += 1
        if self._done == WARM_UP:
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._profile = profile(activities=wanted & supported_activities(), acc_events=True)
            self._profile.start()
        elif self._done == WARM_UP + self._num_steps:
            self.close()

    def close(self) -> None:
        """Write what was traced; where a run ends before its trace began, say so."""
        if self._num_steps and self._profile is None:
            logger.warning("profile: the run ended within its %d steps of warm-up, nothing was traced", WARM_UP)
        elif self._num_steps:
            self._profile.stop()
            with whole_file(self._path) as temporary:
                self._profile.export_chrome_trace(str(temporary))
            logger.info(
                "profile: %d steps in %s; open it with https://ui.perfetto.dev", self._done - WARM_UP, self._path
            )
        self._num_steps, self._profile = 0, None
