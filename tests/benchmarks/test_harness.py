"""Timing, memory and result files of the benchmarks."""

from dataclasses import dataclass

import pytest
import torch

import harness

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    provider: str
    step_ms: float | None


def test_result_file_is_whole_after_each_row(tmp_path):
    path = tmp_path / "new" / "results.csv"
    results = harness.ResultFile(path, CPU)
    for provider, step_ms in (("ours", 1.5), ("theirs", None)):
        results.add(Row(provider, step_ms))
        rows = harness.read_csv(path)
        assert rows[-1]["provider"] == provider
        assert rows[-1]["step_ms"] == ("" if step_ms is None else "1.5")
        assert rows[-1]["torch"] == torch.__version__
    assert list(rows[0]) == ["provider", "step_ms", *harness.environment(CPU)]
    assert len(rows) == 2


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
    assert [len(of_one.step_ms) for of_one in times.values()] == [3, 3]
    assert times["a"].columns()["steps_per_repeat"] == 1


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
