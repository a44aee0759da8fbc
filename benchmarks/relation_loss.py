"""The relation losses against what a user would write in PyTorch: time, memory and distance from the hardware's limits.

python benchmarks/relation_loss.py                                   # ViT-B, S and T of the paper; on the GPU if there
is one python benchmarks/relation_loss.py --sweep all --time-budget 600 --output results.csv
python benchmarks/relation_loss.py --head-dim-s 32 --head-dim-t 64 --num-tokens 577 --batch-size 64
python benchmarks/relation_loss.py --preset lightly --sweep presets head-dim    # LightlyTrain's relation, wide heads

Every provider's loss and gradient are first held against the formula in fp64; one that disagrees gets no number.
Providers run in alternation on inputs that change from step to step. "forward" is the loss without gradient,
"forward_backward" the loss and the gradient of the student's projections, from packed projections to the packed
gradient unless --layout says otherwise. Extra memory is what a step holds beyond its inputs at its worst moment.
"""

from __future__ import annotations

import os
import sys

# Before torch starts OpenMP, as in train.py: a short spin was fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that counts memory complains of a missing GPU

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import harness
import labels
import roofs
import sweep
from loss_point import LIGHTLY, Point, evaluate, make_input_sets, make_oracle
from providers import PROVIDERS, Provider

MODES = ("forward", "forward_backward")
LAYOUTS = ("packed", "bhnd")
DTYPES = ("bfloat16", "float16", "float32")


# Columns of a row behind its status, with numbers only where that is "ok". gb_per_s and tflop_per_s are of the bytes
# and operations that the loss cannot avoid (roofs.py), whatever the provider moved and computed in truth; the shares
# are of this GPU's measured rates, floor_share is floor_ms / step_ms. Errors are relative to the largest entry of the
# fp64 result.
RATES = ("gb_per_s", "tflop_per_s", "hbm_share", "matmul_share", "exp_share", "floor_share", "floor_ms")
COLUMNS = (*sweep.TIMES, "peak_extra_mib", *RATES, "loss_error", "grad_error")


# TinyMIM's chain, each ViT from the next larger one, whose head widths these are (MAE ViT-L -> B -> S -> T).
PRESETS = {
    "B": {"num_heads": 16, "head_dim_s": 48, "head_dim_t": 64},
    "S": {"num_heads": 12, "head_dim_s": 32, "head_dim_t": 64},
    "T": {"num_heads": 12, "head_dim_s": 16, "head_dim_t": 32},
}
# The relation of LightlyTrain's default distillation: one head on whole features of length 1, of the patches alone,
# softmax(F F^T / 0.07); student and teacher may have other widths.
WIDE = {"num_heads": 1, "num_tokens": 196, "head_dim_s": 192, "head_dim_t": 768, "layout": "bhnd", "relations": "vv"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a kind of device is asked for unless flags say otherwise; `sweep_batch_size` is of all but batch and
    presets.
    """

    dtype: str
    batch_size: int
    sweep_batch_size: int
    num_tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    seconds_per_point: float


SCALES = {
    "cuda": Scale(
        dtype="bfloat16",
        batch_size=256,
        sweep_batch_size=64,
        num_tokens=(197, 257, 577, 1025, 2049, 4097),
        batch_sizes=(1, 4, 16, 64, 256, 1024),
        seconds_per_point=4.0,
    ),
    "cpu": Scale(
        dtype="float32",
        batch_size=16,
        sweep_batch_size=2,
        num_tokens=(197, 257, 577, 1025),
        batch_sizes=(1, 4, 16, 64),
        seconds_per_point=10.0,
    ),
}
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128)
WIDE_HEAD_DIMS = (192, 384, 768)
# In the order of what they tell.
SWEEPS = ("presets", "tokens", "batch", "head-dim", "layout", "dtype")


def measure(
    point: Point,
    providers: Mapping[str, Provider],
    device: torch.device,
    *,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The columns of each provider."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a compiled function keeps a few shapes only, and then runs as if it were not compiled
    try:
        input_sets = make_input_sets(point, device)
        oracle = make_oracle(point, input_sets[0])
    except Exception as error:
        if not harness.is_out_of_memory(error):
            raise
        # Without its traceback, which keeps tensors alive.
        return {name: {"status": harness.OUT_OF_MEMORY, "detail": "the inputs alone"} for name in providers}

    upstream = torch.tensor(float(point.num_rows), device=device)
    rotation = {name: itertools.cycle(input_sets) for name in providers}

    def step(name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        return evaluate(providers[name], point, next(rotation[name]), upstream)

    measured = harness.measure(
        {name: partial(step, name) for name in providers},
        lambda name: oracle.gate(*step(name), point),
        device=device,
        seconds=seconds,
        num_repeats=num_repeats,
    )
    rates = roofs.measured_rates(device, point.torch_dtype) if device.type == "cuda" else None
    for columns in measured.values():
        if columns["status"] == harness.OK:
            columns |= throughput(point, columns["step_ms"], rates)
    return measured


def throughput(point: Point, step_ms: float, rates: roofs.Rates | None) -> dict[str, float | None]:
    """The columns RATES, four digits each; shares of the roofs where their rates are known."""
    needed = roofs.total(point.relation_names, point.shape, backward=point.backward)
    columns = {"gb_per_s": needed.num_bytes / step_ms / 1e6, "tflop_per_s": needed.flop / step_ms / 1e9}
    if rates is not None:
        shares = {name: ms / step_ms for name, ms in roofs.times_ms(needed, rates).items()}
        floor_ms = roofs.floor_ms(point.relation_names, point.shape, rates, backward=point.backward)
        columns |= {"hbm_share": shares["bytes"], "matmul_share": shares["matrix unit"]}
        columns |= {"exp_share": shares["exponentials"], "floor_share": floor_ms / step_ms, "floor_ms": floor_ms}
    return {name: float(f"{value:.4g}") if value else None for name, value in columns.items()}


def show(rows: Sequence[sweep.Row]) -> None:
    """One point: its numbers, and how many times as fast ours is as each peer."""
    floor_ms = next((row["floor_ms"] for row in rows if row["floor_ms"]), None)
    print(f"\n{point_of(rows[0])}" + (f", floor {floor_ms:.4g} ms" if floor_ms else ""))
    sweep.print_columns(rows, SHOWN)


def point_of(row: sweep.Row) -> Point:
    """What a row measured."""
    return Point(**{name: row[name] for name in Point.__dataclass_fields__})


def print_summary(rows: Sequence[sweep.Row]) -> None:
    """All points: the ratio to every peer, or why there is none."""
    peers = labels.in_order(row["provider"] for row in rows if row["provider"] not in labels.OURS)
    by_point: dict[str, list[sweep.Row]] = {}
    for row in rows:
        by_point.setdefault(str(point_of(row)), []).append(row)
    width = max(map(len, by_point)) + 2
    print(f"\n{'times as fast as':<{width}}{'ours':<9}" + "".join(f"{name:>16}" for name in peers))
    for name, of_point in by_point.items():
        mine, ratios = labels.our_row(of_point), sweep.ratios_to_peers(of_point)
        status = {row["provider"]: row["status"] for row in of_point}
        cells = (f"{ratios[peer]:.2f}x" if peer in ratios else status.get(peer, "") for peer in peers)
        print(f"{name:<{width}}{mine['provider'] if mine else '-':<9}" + "".join(f"{cell:>16}" for cell in cells))


def significant(value: float) -> str:
    """Four digits."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}" if value >= 1e-3 else f"{value:.1e}"


# Of the table: title, column of a row, how to print it.
SHOWN = [
    ("ms", "step_ms", significant),
    ("20 %", "step_ms_p20", significant),
    ("80 %", "step_ms_p80", significant),
    ("extra MiB", "peak_extra_mib", "{:.1f}".format),
    ("GB/s", "gb_per_s", significant),
    ("TFLOP/s", "tflop_per_s", significant),
    ("of HBM", "hbm_share", "{:.0%}".format),
    ("of matrix", "matmul_share", "{:.0%}".format),
    ("of exp", "exp_share", "{:.0%}".format),
    ("of floor", "floor_share", "{:.0%}".format),
    ("loss err", "loss_error", "{:.0e}".format),
    ("grad err", "grad_error", "{:.0e}".format),
]


def plan(args: argparse.Namespace) -> list[Point]:
    """The points that the flags ask for, the most important first."""
    scale = SCALES[args.device.type]
    flags = {
        name: getattr(args, name)
        for name in ("batch_size", "num_heads", "num_tokens", "head_dim_s", "head_dim_t", "layout")
        if getattr(args, name) is not None
    }
    custom, wide = bool(flags.keys() & PRESETS["B"].keys()), args.preset[0] == LIGHTLY

    def points(sweep: str, presets: Sequence[str], **values) -> Iterator[Point]:
        for relations in args.relations:
            for preset in presets:
                of_preset = WIDE if preset == LIGHTLY else {**PRESETS[preset], "relations": relations}
                name = preset if preset == LIGHTLY or not custom else ""
                yield Point(
                    sweep=sweep,
                    preset=name,
                    **{"dtype": args.dtype or scale.dtype, **of_preset, **values, **flags},
                )

    def swept(sweep: str, **values: Sequence) -> Iterator[Point]:
        ((name, column),) = values.items()
        if name in flags or (name == "dtype" and args.dtype):
            raise ValueError(
                f"--{name.replace('_', '-')}: got a value, but --sweep {sweep} varies it; want one of the two"
            )
        for value in column:
            yield from points(sweep, args.preset[:1], **{"batch_size": scale.sweep_batch_size, name: value})

    plans = {
        "presets": lambda: points("presets", args.preset[:1] if custom else args.preset, batch_size=scale.batch_size),
        "tokens": lambda: swept("tokens", num_tokens=scale.num_tokens),
        "batch": lambda: swept("batch", batch_size=scale.batch_sizes),
        "head-dim": lambda: swept("head-dim", head_dim_s=WIDE_HEAD_DIMS if wide else HEAD_DIMS),
        "layout": lambda: swept("layout", layout=LAYOUTS),
        "dtype": lambda: swept("dtype", dtype=DTYPES),
    }
    wanted = SWEEPS if "all" in args.sweep else [name for name in SWEEPS if name in args.sweep]
    planned = []
    for name in wanted:
        modes = args.modes or (MODES[::-1] if name == "presets" else MODES[1:])
        planned += [replace(point, mode=mode) for mode in modes for point in plans[name]()]
    return planned


def providers_of(args: argparse.Namespace, point: Point) -> list[str]:
    """Those that --providers names, else all that the device can run; padding is compared at the presets only."""
    on_cuda = args.device.type == "cuda"
    able = [name for name in PROVIDERS if name != "triton" or on_cuda]
    return args.providers or [name for name in able if name != "compile_padded" or point.sweep == "presets"]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with args.points as planned from them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sweep.add_flags(parser, PROVIDERS)
    add = parser.add_argument
    add("--preset", nargs="+", choices=[*PRESETS, LIGHTLY], default=list(PRESETS), help="default: B S T")
    add("--sweep", nargs="+", choices=[*SWEEPS, "all"], default=["presets"], help="from the first preset")
    add("--modes", nargs="+", choices=MODES, help="default: both for presets, else forward_backward")
    add("--relations", nargs="+", default=["qk+vv"], help="each is timed on its own (default: qk+vv)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--layout", choices=LAYOUTS, help="(B, N, 3 C), or q, k, v as (B, H, N, D); default: packed")
    for name in ("--batch-size", "--num-heads", "--num-tokens", "--head-dim-s", "--head-dim-t"):
        add(name, type=sweep.positive, help="instead of the preset's")
    add("--seconds-per-point", type=float, help="how long to repeat (default: 4 on a GPU, 10 on a CPU)")
    args = parser.parse_args(arguments)
    sweep.read_device(parser, args)
    for relations in args.relations:
        if not all(relation in ("qk", "vv", "qq", "kk") for relation in relations.split("+")):
            parser.error(f"--relations: got {relations!r}, want qk, vv, qq and kk joined by +")
    try:
        args.points = plan(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Measure, print, and write the rows; the exit code."""
    args = parse_args()
    scale = SCALES[args.device.type]
    results = sweep.Results(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    if args.device.type == "cpu":
        waiting = ", ".join(f"{name}={os.environ.get(name)}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
        print(f"On the CPU ({waiting}): not measured here are the Triton kernels, and shares of a GPU's roofs.")
    else:
        dtype = getattr(torch, args.dtype or scale.dtype)
        print(roofs.describe(roofs.measured_rates(args.device, dtype), dtype))

    def measured(point: Point) -> dict[str, dict[str, Any]]:
        chosen = {name: PROVIDERS[name] for name in providers_of(args, point)}
        seconds = args.seconds_per_point or scale.seconds_per_point
        return measure(point, chosen, args.device, seconds=seconds, num_repeats=args.num_repeats)

    try:
        sweep.run(args.points, measured, results, columns=COLUMNS, show=show, budget_s=args.time_budget)
    except KeyboardInterrupt:
        return sweep.finish(results, interrupted=True)
    print_summary(results.rows)
    return sweep.finish(results)


if __name__ == "__main__":
    sys.exit(main())
