"""Timing, memory and the gate of the benchmarks."""

import pytest
import torch

import harness

CPU = torch.device("cpu")


def test_percentiles():
    assert harness.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {
        "step_ms": 3.5,
        "step_ms_p20": 2.0,
        "step_ms_p80": 5.0,
    }
    assert set(harness.percentiles([7.0]).values()) == {7.0}


def test_steps_alternate():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = harness.time_interleaved(steps, device=CPU, num_repeats=3)
    assert calls[-6:] == ["a", "b"] * 3
    assert [(of_one["num_repeats"], of_one["steps_per_repeat"]) for of_one in times.values()] == [(3, 1), (3, 1)]


def test_failing_step_is_named():
    def fail():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(harness.StepError) as caught:
        harness.time_interleaved({"fine": int, "broken": fail}, device=CPU, num_repeats=2)
    assert caught.value.name == "broken"
    assert harness.is_out_of_memory(caught.value.__cause__)


def test_out_of_memory_of_the_cpu_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert harness.is_out_of_memory(caught.value)
    assert not harness.is_out_of_memory(ValueError("other"))


def test_peak_memory_is_of_the_worst_moment():
    def step():
        x = torch.zeros(2**18)  # 1 MiB
        y = torch.cat([x, x])  # 2 MiB
        del x
        return y.sum()

    assert harness.peak_extra_mib(step, CPU) == 3.0
