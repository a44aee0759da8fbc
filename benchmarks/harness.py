"""Timing, memory, the correctness gate, and what becomes of a step that fails."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# A checkout needs no installation; where one is installed, that is what is measured.
sys.path.append(str(Path(__file__).parent.parent))

from tinymim_fast.kernels.reference import FLOORS

# What `status` of a row may be; only "ok" comes with numbers.
OK, OUT_OF_MEMORY, FAILED_GATE, NOT_AVAILABLE = "ok", "out of memory", "failed gate", "not available"

MIN_REPEATS, MAX_REPEATS = 5, 50
# CUDA events lie around so many milliseconds of steps: far above their resolution and the cost of a launch.
MIN_BLOCK_MS = 10.0


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error over the largest entry of `exact`; NaN where `actual` is not finite."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def passes_gate(error: float, eager_error: float, dtype: torch.dtype) -> bool:
    """The rule of the tests: at most twice the error of eager PyTorch in the same dtype, plus a floor."""
    return error <= 2 * eager_error + FLOORS[dtype]


class StepError(Exception):
    """A step failed while it was timed; `name` is whose, the cause is the error."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> dict[str, dict[str, float | int]]:
    """The columns TIMES of all steps in alternation, so that a busy spell or a hot chip hits everyone.

    On CUDA, a repeat is as many steps behind one another as fill MIN_BLOCK_MS, between two events: what a loop that
    does not wait for the device sees; one more before them is not timed, in which the allocator takes back what the
    others left. Elsewhere a repeat is one step. To leave the caches cold, a step must take other inputs each time.

    Args:
        seconds: all repeats together take about as long, but there are at least MIN_REPEATS, at most MAX_REPEATS.
        num_repeats: so many, however long they take.

    Raises:
        StepError: from what a step raised.
    """
    cuda = device.type == "cuda"
    steps_per_repeat, round_ms = {}, 0.0
    for name, step in steps.items():
        timed(name, step, 1, device)
        step_ms = timed(name, step, 3 if cuda else 1, device)
        steps_per_repeat[name] = math.ceil(MIN_BLOCK_MS / step_ms) if cuda else 1
        round_ms += (steps_per_repeat[name] + cuda) * step_ms
    if num_repeats is None:
        num_repeats = min(max(int(1e3 * seconds / max(round_ms, 1e-3)), MIN_REPEATS), MAX_REPEATS)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_repeats):
        for name, step in steps.items():
            if cuda:
                timed(name, step, 1, device)
            times[name].append(timed(name, step, steps_per_repeat[name], device))
    return {
        name: {**percentiles(step_ms), "num_repeats": len(step_ms), "steps_per_repeat": steps_per_repeat[name]}
        for name, step_ms in times.items()
    }


def timed(name: str, step: Callable[[], object], num_steps: int, device: torch.device) -> float:
    """Mean milliseconds of `num_steps` steps behind one another."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(num_steps):
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / num_steps
        start_s = time.perf_counter()
        for _ in range(num_steps):
            step()
        return 1e3 * (time.perf_counter() - start_s) / num_steps
    except Exception as error:
        raise StepError(name) from error


def percentiles(step_ms: list[float]) -> dict[str, float]:
    """The columns of one list of times: median, 20th and 80th percentile, in milliseconds."""
    fifths = statistics.quantiles(step_ms, n=5, method="inclusive") if len(step_ms) > 1 else step_ms * 4
    times = {"step_ms": statistics.median(step_ms), "step_ms_p20": fifths[0], "step_ms_p80": fifths[3]}
    return {name: round(value, 4) for name, value in times.items()}


def measure(
    steps: Mapping[str, Callable[[], object]], gate: Callable[[str], dict[str, Any]], **timing: Any
) -> dict[str, dict[str, Any]]:
    """Columns by provider: those that pass the gate are timed, those that fail in any way say why.

    Args:
        steps: of each provider.
        gate: columns of a provider, "status" among them; only OK goes on.
        timing: device, seconds and num_repeats, as for time_interleaved.
    """
    device = timing["device"]
    columns: dict[str, dict[str, Any]] = {}
    running = {}
    for name, step in steps.items():
        columns[name] = {}
        try:
            columns[name] = gate(name)
            if columns[name]["status"] == OK:
                step()
                columns[name]["peak_extra_mib"] = peak_extra_mib(step, device)
                running[name] = step
        except Exception as error:
            columns[name] |= failure(error)
        release(device)
    while running:
        try:
            for name, times in time_interleaved(running, **timing).items():
                columns[name] |= times
            break
        except StepError as error:
            columns[error.name] |= failure(error.__cause__)
            del running[error.name]
        release(device)
    return columns


def failure(error: BaseException) -> dict[str, str]:
    """The columns of a provider that raised: out of memory is a result, anything else is not available."""
    return {"status": OUT_OF_MEMORY if is_out_of_memory(error) else NOT_AVAILABLE, "detail": one_line(error)}


def release(device: torch.device) -> None:
    """Give back what a failed or a finished provider left, so that the next one finds the memory as the first did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_extra_mib(step: Callable[[], object], device: torch.device) -> float:
    """The most bytes in tensors during a step beyond those before it, with what it returns, in MiB.

    As counted by PyTorch's allocator: on CUDA by its own counters, on the CPU from the profiler's record of what was
    handed out and taken back. Memory that libraries get elsewhere, such as work space of MKL, is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return round(max(held, default=0) / 2**20, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, also where the compiler wraps it, or that of the CPU allocator, which has no type of its own."""
    typed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return typed or "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a row's `detail`."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
