"""Points within a budget, their rows, and the end of a program."""

import csv
import time
from dataclasses import dataclass

import pytest
import torch

import harness
import sweep

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    benchmark: str = "test"
    size: int


def points(*sizes, name="a"):
    return [Point(sweep=name, size=size) for size in sizes]


def run(wanted, measure, results, **options):
    sweep.run(wanted, measure, results, columns=("step_ms",), show=lambda rows: None, **options)


def test_the_file_is_whole_after_each_point(tmp_path):
    path = tmp_path / "new" / "results.csv"
    results = sweep.Results(path, CPU)

    def measure(point):
        if point.size == 2:
            with path.open() as file:
                assert [row["step_ms"] for row in csv.DictReader(file)] == ["1.5", ""]
        return {"ours": {"step_ms": 1.5}, "theirs": {"status": harness.NOT_AVAILABLE, "detail": "why"}}

    run(points(1, 2), measure, results)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = ["benchmark", "sweep", "size", "provider", "status", "detail", "step_ms"]
    assert list(rows[0]) == [*columns, *sweep.environment(CPU)] and len(rows) == 4
    assert [(row["size"], row["status"]) for row in rows[1:3]] == [("1", "not available"), ("2", "ok")]
    assert rows[0]["torch"] == torch.__version__
    assert [file.name for file in path.parent.iterdir()] == ["results.csv"]


def test_columns_that_nobody_announced_are_refused():
    with pytest.raises(AssertionError, match="among `columns`"):
        sweep.rows_of(points(1)[0], {"ours": {"step_ms": 1.0, "other": 2}, "theirs": {}}, ("step_ms",))


def test_points_that_differ_in_the_sweep_alone_are_measured_once():
    measured = []
    results = sweep.Results(None, CPU)
    wanted = [*points(1, 2), *points(2, 3, name="b")]
    run(wanted, lambda point: measured.append(point.size) or {"ours": {"step_ms": point.size}}, results)
    assert measured == [1, 2, 3]
    assert [(row["sweep"], row["size"], row["step_ms"]) for row in results.rows] == [
        ("a", 1, 1),
        ("a", 2, 2),
        ("b", 2, 2),
        ("b", 3, 3),
    ]


def test_what_may_not_end_in_time_is_named(capsys):
    results = sweep.Results(None, CPU)

    def measure(point):
        time.sleep(0.1 * point.size)
        return {"ours": {}}

    run(points(1, 9, 2), measure, results, budget_s=0.5, cost=lambda point: point.size)
    assert [row["size"] for row in results.rows] == [1, 2]
    assert "--time-budget 0.5: left out Point(benchmark='test', sweep='a', size=9)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("provider", "status", "code"),
    [("chunked", "failed gate", 1), ("chunked", "out of memory", 0), ("official", "failed gate", 0)],
)
def test_ours_must_not_be_wrong(provider, status, code, capsys):
    results = sweep.Results(None, CPU)
    run(points(1), lambda point: {provider: {"status": status, "detail": "why"}}, results)
    assert sweep.finish(results) == code
    assert ("chunked: failed gate: why" in capsys.readouterr().err) == bool(code)
    assert sweep.finish(results, interrupted=True) == 130


def test_ratios_are_of_the_first_of_ours_that_has_a_number(capsys):
    columns = {"triton": {"status": "not available"}, "chunked": {"step_ms": 2.0}, "official": {"step_ms": 5.0}}
    rows = sweep.rows_of(points(1)[0], columns, ("step_ms",))
    assert sweep.ratios_to_peers(rows) == {"official": 2.5}
    sweep.print_columns(rows, [("ms", "step_ms", str)])
    assert capsys.readouterr().out.splitlines()[-1] == "  chunked is 2.5x as fast as official"
