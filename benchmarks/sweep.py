"""A sweep: points in order within a budget, their rows in one CSV and on the screen; the flags of all such programs."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

import harness
import labels
import machine
from tinymim_fast.files import write_text

Row = dict[str, Any]
TIMES = ("step_ms", "step_ms_p20", "step_ms_p80", "num_repeats", "steps_per_repeat")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured, the first columns of a row; points that differ in `sweep` alone are measured once."""

    benchmark: str
    sweep: str


class Results:
    """The rows so far, with the environment as their last columns; the CSV is whole after each point.

    Args:
        path: the CSV, overwritten with the first rows, its folder is made; None for none.
        device: what is measured.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path, self.environment = path, environment(device)
        self.rows: list[Row] = []

    def add(self, rows: Iterable[Row]) -> list[Row]:
        """Append rows, all with the same columns; returns them with the environment."""
        added = [{**row, **self.environment} for row in rows]
        self.rows += added
        if self.path is not None and added:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.path, text.getvalue())
        return added


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that describe machine and software."""
    cuda = device.type == "cuda"
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else machine.cpu_name(),
        "driver": machine.driver() if cuda else "",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": machine.commit(),
        "date": datetime.date.today().isoformat(),
    }


def rows_of(point: Point, measured: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[Row]:
    """A row for each provider: the point, provider, status, detail, and `columns`, empty where nothing was measured."""
    empty = {"status": harness.OK, "detail": "", **dict.fromkeys(columns)}
    rows = [{**asdict(point), "provider": provider, **empty, **found} for provider, found in measured.items()]
    assert all(len(row) == len(rows[0]) for row in rows), "a column that is not among `columns`"
    return rows


def run(
    points: Sequence[Point],
    measure: Callable[[Any], Mapping[str, Mapping[str, Any]]],
    results: Results,
    *,
    columns: Sequence[str],
    show: Callable[[list[Row]], None],
    budget_s: float | None = None,
    cost: Callable[[Any], float] = lambda point: 1.0,
) -> None:
    """Measure point by point, in their order, while the budget lasts; each point's rows are written and shown at once.

    Args:
        measure: columns by provider of a point.
        results: gets the rows.
        columns: of the benchmark, behind status and detail.
        show: prints the rows of a point.
        budget_s: no point starts that may not end within so many seconds; those are named at the end. None for no
            limit.
        cost: how long a point takes relative to others; the slowest so far is what is expected.
    """
    start_s, s_per_cost = time.monotonic(), 0.0
    measured: dict[Point, Mapping[str, Mapping[str, Any]]] = {}
    left_out = []
    for point in points:
        key = replace(point, sweep="")
        if key not in measured:
            began_s = time.monotonic()
            if budget_s is not None and began_s - start_s + s_per_cost * cost(point) > budget_s:
                left_out.append(str(point))
                continue
            measured[key] = measure(point)
            s_per_cost = max(s_per_cost, (time.monotonic() - began_s) / cost(point))
        show(results.add(rows_of(point, measured[key], columns)))
        sys.stdout.flush()
    if left_out:
        print(f"\n--time-budget {budget_s:g}: left out " + "; ".join(left_out))


def add_flags(parser: argparse.ArgumentParser, providers: Iterable[str]) -> None:
    """The flags that every sweep has; `read_device` follows the parsing."""
    add = parser.add_argument
    add("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    add("--providers", nargs="+", choices=list(providers), help="default: all that the device can run")
    add("--num-repeats", type=positive, help="so many, however long they take")
    add("--time-budget", type=float, metavar="SECONDS", help="start no point that may not end in time")
    add("--output", type=Path, metavar="CSV", help="written point by point")


def read_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """args.device as a device that is there, with its index; else the parser's error."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cuda", "cpu"):
        parser.error(f"--device: got {device}, want cuda or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: got cuda, but PyTorch sees no GPU; want --device cpu")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    args.device = device


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want at least 1")
    return value


def finish(results: Results, interrupted: bool = False) -> int:
    """The last lines of a program, and its exit code: 1 where one of ours failed the gate or did not run."""
    if interrupted:
        print(f"\ninterrupted; {results.path or 'the output above'} holds what was measured")
        return 130
    if results.path:
        print(f"\n{results.path}: {len(results.rows)} rows")
    bad = (harness.FAILED_GATE, harness.NOT_AVAILABLE)
    broken = [row for row in results.rows if row["provider"] in labels.OURS and row["status"] in bad]
    for row in broken:
        print(f"{row['provider']}: {row['status']}: {row['detail']}", file=sys.stderr)
    return 1 if broken else 0


def print_columns(rows: Sequence[Row], columns: Sequence[tuple[str, str, Callable[[Any], str]]]) -> None:
    """A line for each provider, and why there are no numbers; columns as title, name and text, empty ones left out.

    Below it how many times our time each peer takes.
    """
    shown = [column for column in columns if any(row[column[1]] is not None for row in rows)]
    print(f"  {'provider':<16}" + "".join(f"{title:>13}" for title, _, _ in shown))
    for row in rows:
        if row["status"] == harness.OK:
            cells = (text(row[name]) if row[name] is not None else "" for _, name, text in shown)
            print(f"  {row['provider']:<16}" + "".join(f"{cell:>13}" for cell in cells))
        else:
            print(f"  {row['provider']:<16}{row['status']}" + (f" ({row['detail']})" if row["detail"] else ""))
    if ratios := ratios_to_peers(rows):
        ours = labels.our_row(rows)["provider"]
        print(f"  {ours} is " + ", ".join(f"{x:.3g}x as fast as {name}" for name, x in ratios.items()))


def ratios_to_peers(rows: Sequence[Row]) -> dict[str, float]:
    """Times of the peers over ours, by provider."""
    mine = labels.our_row(rows)
    peers = [row for row in rows if mine and row["provider"] not in labels.OURS and row["step_ms"]]
    return {row["provider"]: row["step_ms"] / mine["step_ms"] for row in peers}
