"""Attention kernels as a ViT block calls them, and the table that `--attention auto` follows.

python benchmarks/attention.py --output benchmarks/results/<device>/attention.csv    # measures
python benchmarks/attention.py --write-table    # what all such files say goes into models/attention.py

A step goes from views of a packed projection to what the output projection reads, (B, N, C) contiguous; with gradient
to that of the packed projection. Each kernel is first held against the formula in fp64. In sweep "vits" are the heads
of ViT-T, S, B and L at 197 tokens, of which the table is made: for an architecture, a dtype, and with gradients or
without, it names the kernel with the least time relative to sdpa's, geometric mean over the heads, where that is below
0.95 and at no number of heads above 1.05. "flash" is FlashAttention 3 or 4 where that is installed.
"""

from __future__ import annotations

import os

# Before torch starts OpenMP, as in train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that counts memory complains of a missing GPU

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor

import harness
import readme_tables
import sweep
from tinymim_fast.files import write_text
from tinymim_fast.models.attention import KERNELS, architecture, attend, use_attention

TABLE_FILE = Path(__file__).parent.parent / "tinymim_fast" / "models" / "attention.py"
SWEEPS = ("vits", "tokens", "head-dim")
MODES = ("forward_backward", "forward")
DTYPES = ("bfloat16", "float32")
NUM_HEADS = (3, 6, 12, 16)
# Relative to sdpa's time: a kernel is taken below the first, and not where any number of heads is above the second.
TAKEN_BELOW, NEVER_ABOVE = 0.95, 1.05
# `kernel` says whose the kernel was where the provider's name doesn't; the error is the largest over the largest entry
# of the fp64 result.
COLUMNS = (*sweep.TIMES, "peak_extra_mib", "tflop_per_s", "architecture", "kernel", "out_error", "grad_error")
SHOWN = [
    ("ms", "step_ms", "{:.4g}".format),
    ("20 %", "step_ms_p20", "{:.4g}".format),
    ("80 %", "step_ms_p80", "{:.4g}".format),
    ("extra MiB", "peak_extra_mib", "{:.1f}".format),
    ("TFLOP/s", "tflop_per_s", "{:.3g}".format),
    ("out err", "out_error", "{:.0e}".format),
    ("grad err", "grad_error", "{:.0e}".format),
]
Key = tuple[str, str, bool]  # architecture, dtype, with gradients


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    """What is measured; dtype is that of inputs and outputs."""

    benchmark: str = "attention"
    sweep: str = "vits"
    mode: str = "forward_backward"
    dtype: str
    batch_size: int
    num_heads: int
    num_tokens: int = 197
    head_dim: int = 64

    def __str__(self) -> str:
        shape = f"B={self.batch_size} H={self.num_heads} N={self.num_tokens} D={self.head_dim}"
        return f"{self.mode} {self.dtype} {shape}"


def step(kernel: str, qkv: Tensor, upstream: Tensor | None) -> tuple[Tensor, ...]:
    """The output, (B, N, C), and the gradient of the packed projection (B, N, 3, H, D)."""
    out = attend(kernel, *qkv.unbind(2)).flatten(2)
    return (out,) if upstream is None else (out, *torch.autograd.grad(out, qkv, upstream))


def formula(qkv: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same, written out, in one dtype."""
    qkv = qkv.detach().to(dtype).requires_grad_(upstream is not None)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = (((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return (out,) if upstream is None else (out, *torch.autograd.grad(out, qkv, upstream.to(dtype)))


def measure(
    point: Point,
    kernels: Sequence[str],
    device: torch.device,
    *,
    seconds: float = 3.0,
    num_repeats: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The columns of each kernel."""
    dtype, backward = getattr(torch, point.dtype), point.mode == "forward_backward"
    generator = torch.Generator(device).manual_seed(0)
    shape = point.batch_size, point.num_tokens, 3, point.num_heads, point.head_dim
    qkv = torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_(backward)
    upstream = None
    if backward:
        upstream = torch.randn(*shape[:2], shape[3] * shape[4], device=device, generator=generator).to(dtype)
    few = slice(0, 2)  # images, whose results are compared
    plain, exact = (
        formula(qkv[few], upstream if upstream is None else upstream[few], d) for d in (dtype, torch.float64)
    )
    allowed = [harness.relative_error(a, b) for a, b in zip(plain, exact)]

    def gate(name: str) -> dict[str, Any]:
        layer = Attention(point.head_dim, num_heads=1)
        columns = {"architecture": architecture(device)}
        columns["kernel"] = use_attention(layer, name, device, dtype, gradients=backward)
        errors = [harness.relative_error(z[few], want) for z, want in zip(step(name, qkv, upstream), exact)]
        columns |= {f"{what}_error": float(f"{error:.2e}") for what, error in zip(("out", "grad"), errors)}
        if all(harness.passes_gate(error, of_plain, dtype) for error, of_plain in zip(errors, allowed)):
            return {**columns, "status": harness.OK}
        detail = "plain PyTorch's errors: " + ", ".join(f"{error:.1e}" for error in allowed)
        return {**columns, "status": harness.FAILED_GATE, "detail": detail}

    steps = {name: lambda name=name: step(name, qkv, upstream) for name in kernels}
    with torch.set_grad_enabled(backward):
        measured = harness.measure(steps, gate, device=device, seconds=seconds, num_repeats=num_repeats)
    flop = (12 if backward else 4) * point.batch_size * point.num_heads * point.num_tokens**2 * point.head_dim
    for columns in measured.values():
        if columns["status"] == harness.OK:
            columns["tflop_per_s"] = float(f"{flop / columns['step_ms'] / 1e9:.4g}")
    return measured


def table(rows: Iterable[Mapping[str, Any]]) -> dict[Key, str]:
    """What `auto` takes, by what rows of sweep "vits" say; where that is sdpa there is no entry."""
    ratios: dict[Key, dict[str, dict[str, float]]] = {}
    times = {(_key(row), row["num_heads"], row["provider"]): float(row["step_ms"]) for row in rows if _counts(row)}
    for (key, num_heads, kernel), step_ms in times.items():
        of_sdpa = times.get((key, num_heads, "sdpa"))
        if of_sdpa and kernel != "sdpa":
            ratios.setdefault(key, {}).setdefault(kernel, {})[num_heads] = step_ms / of_sdpa
    taken = {}
    for key, kernels in ratios.items():
        means = {
            kernel: statistics.geometric_mean(of_heads.values())
            for kernel, of_heads in kernels.items()
            if max(of_heads.values()) <= NEVER_ABOVE
        }
        best = min(means, key=means.__getitem__, default=None)
        if best is not None and means[best] < TAKEN_BELOW:
            taken[key] = best
    return dict(sorted(taken.items()))


def _counts(row: Mapping[str, Any]) -> bool:
    return row["sweep"] == "vits" and row["status"] == harness.OK


def _key(row: Mapping[str, Any]) -> Key:
    return row["architecture"], row["dtype"], row["mode"] == "forward_backward"


def with_table(source: str, taken: Mapping[Key, str]) -> str:
    """The source of models/attention.py with this table in it."""
    lines = [
        f'    ("{arch}", torch.{dtype}, {gradients}): "{name}",\n' for (arch, dtype, gradients), name in taken.items()
    ]
    literal = "MEASURED = {\n" + "".join(lines) + "}\n" if lines else "MEASURED = {}\n"
    written, count = re.subn(
        r"^MEASURED = \{\n(?:    .*\n)*\}\n|^MEASURED = \{\}\n", literal, source, flags=re.MULTILINE
    )
    if count != 1:
        raise ValueError(f"{TABLE_FILE.name}: got {count} tables MEASURED, want 1")
    return written


def plan(args: argparse.Namespace) -> list[Point]:
    """The heads of ViTs first; then other numbers of tokens and head widths, of ViT-B."""
    points = []
    for dtype in args.dtypes:
        for mode in args.modes:
            base = Point(dtype=dtype, mode=mode, batch_size=args.batch_size, num_heads=12)
            small = replace(base, batch_size=max(1, args.batch_size // 4))
            of_sweep = {
                "vits": [replace(base, num_heads=heads) for heads in NUM_HEADS],
                "tokens": [replace(small, sweep="tokens", num_tokens=n) for n in (50, 257, 577, 1025)],
                "head-dim": [replace(small, sweep="head-dim", head_dim=d) for d in (32, 80, 128)],
            }
            points += [point for name in args.sweep for point in of_sweep[name]]
    return sorted(points, key=lambda point: SWEEPS.index(point.sweep))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with args.points as planned from them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sweep.add_flags(parser, KERNELS)
    add = parser.add_argument
    add("--sweep", nargs="+", choices=SWEEPS, default=["vits"], help="default: vits")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--dtypes", nargs="+", choices=[*DTYPES, "float16"], help="default: bfloat16, and on a CPU float32 too")
    add(
        "--batch-size", type=sweep.positive, help="of sweep vits, a quarter of it elsewhere (default: 256; 16 on a CPU)"
    )
    add("--seconds-per-point", type=float, default=3.0, help="how long to repeat (default: 3)")
    add("--write-table", action="store_true", help="measure nothing: from the results that are committed")
    args = parser.parse_args(arguments)
    sweep.read_device(parser, args)
    cuda = args.device.type == "cuda"
    args.batch_size = args.batch_size or (256 if cuda else 16)
    args.dtypes = args.dtypes or (["bfloat16"] if cuda else list(DTYPES))
    args.points = plan(args)
    return args


def committed_table() -> dict[Key, str]:
    """By all result files."""
    return table(readme_tables.read_rows(readme_tables.RESULTS, "attention.csv"))


def show(rows: Sequence[sweep.Row]) -> None:
    """One point."""
    print(f"\n{Point(**{name: rows[0][name] for name in Point.__dataclass_fields__})}")
    sweep.print_columns(rows, SHOWN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows; the exit code."""
    args = parse_args(arguments)
    if args.write_table:
        write_text(TABLE_FILE, with_table(TABLE_FILE.read_text(), committed_table()))
        return 0
    results = sweep.Results(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    timing = {"seconds": args.seconds_per_point, "num_repeats": args.num_repeats}

    def measured(point: Point) -> dict[str, dict[str, Any]]:
        return measure(point, args.providers or KERNELS, args.device, **timing)

    try:
        sweep.run(args.points, measured, results, columns=COLUMNS, show=show, budget_s=args.time_budget)
    except KeyboardInterrupt:
        return sweep.finish(results, interrupted=True)
    taken = [
        f"{arch}, {dtype}{', gradients' * grad}: {name}" for (arch, dtype, grad), name in table(results.rows).items()
    ]
    print("\nfaster than sdpa by the rule above: " + ("; ".join(taken) or "nothing"))
    return sweep.finish(results)


if __name__ == "__main__":
    sys.exit(main())
