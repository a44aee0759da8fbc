"""Timing, correctness gate and the CSV schema that every benchmark here shares."""

import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from torch import Tensor

# Largest error allowed beyond twice that of eager PyTorch, relative to the largest entry of the exact result:
# a few roundings of the dtype.
FLOORS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a result file. Errors are relative to the largest entry of the fp64 result."""

    benchmark: str
    provider: str
    relations: str
    dtype: str
    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim_s: int
    head_dim_t: int
    step_ms: float
    step_ms_p20: float
    step_ms_p80: float
    num_repeats: int
    loss_error: float
    grad_error: float
    device: str
    num_threads: int
    torch: str
    triton: str
    date: str
    commit: str


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that describe the machine and the software."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error over the largest entry of `exact`; NaN where `actual` is not finite."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def passes_gate(error: float, eager_error: float, dtype: torch.dtype) -> bool:
    """The rule of the tests: at most twice the error of eager PyTorch in the same dtype, plus a floor."""
    return error <= 2 * eager_error + FLOORS[dtype]


def time_interleaved(
    steps: Mapping[str, Callable[[], object]], num_repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each step, `num_repeats` rounds of all of them, so that a busy spell hits everyone."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        for step in steps.values():
            step()
    step_ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_repeats):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            step_ms[name].append(1e3 * (time.perf_counter() - start))
    return step_ms


def percentiles(step_ms: list[float]) -> dict[str, float]:
    """The columns of one list of times: median, 20th and 80th percentile."""
    fifths = statistics.quantiles(step_ms, n=5, method="inclusive")
    times = {"step_ms": statistics.median(step_ms), "step_ms_p20": fifths[0], "step_ms_p80": fifths[3]}
    return {name: round(value, 3) for name, value in times.items()}


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def print_table(rows: list[Row], ours: str) -> None:
    """The times, and how many times as fast `ours` is as each peer."""
    columns = f"{'ms':>9}{'20 %':>9}{'80 %':>9}{'loss err':>11}{'grad err':>11}"
    print(f"{'relations':<10}{'provider':<12}{columns}  {ours} is")
    our_ms = {row.relations: row.step_ms for row in rows if row.provider == ours}
    for row in rows:
        peer = row.provider != ours and row.relations in our_ms
        ratio = f"  {row.step_ms / our_ms[row.relations]:.2f}x as fast" if peer else ""
        print(
            f"{row.relations:<10}{row.provider:<12}{row.step_ms:>9.1f}{row.step_ms_p20:>9.1f}{row.step_ms_p80:>9.1f}"
            f"{row.loss_error:>11.1e}{row.grad_error:>11.1e}{ratio}"
        )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "uncommitted"
