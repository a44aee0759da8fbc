"""The relation losses against what a user would write in PyTorch: time, memory and distance from the hardware's limits.

python benchmarks/relation_loss.py                                   # ViT-B, S and T of the paper; on the GPU if there is one
python benchmarks/relation_loss.py --sweep all --time-budget 600 --output results.csv
python benchmarks/relation_loss.py --head-dim-s 32 --head-dim-t 64 --num-tokens 577 --batch-size 64

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
import gc
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import harness
import roofs
from providers import OURS, PROVIDERS, Provider, Side, formula, projections

MODES = ("forward", "forward_backward")
LAYOUTS = ("packed", "bhnd")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured; dtype is that of all inputs."""

    benchmark: str = "relation_loss"
    sweep: str = "presets"
    preset: str = ""
    mode: str = "forward_backward"
    relations: str = "qk+vv"
    dtype: str
    layout: str = "packed"
    batch_size: int
    num_heads: int
    num_tokens: int = 197
    head_dim_s: int
    head_dim_t: int

    @property
    def backward(self) -> bool:
        return self.mode == "forward_backward"

    @property
    def relation_names(self) -> list[str]:
        return self.relations.split("+")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> roofs.Shape:
        return roofs.Shape(
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            num_tokens=self.num_tokens,
            head_dim_s=self.head_dim_s,
            head_dim_t=self.head_dim_t,
            itemsize=self.torch_dtype.itemsize,
        )

    @property
    def num_rows(self) -> int:
        return self.batch_size * self.num_heads * self.num_tokens

    def __str__(self) -> str:
        return (
            f"{self.preset and 'ViT-' + self.preset + ' '}{self.mode} {self.relations} {self.dtype} {self.layout} "
            f"B={self.batch_size} H={self.num_heads} N={self.num_tokens} D_s={self.head_dim_s} D_t={self.head_dim_t}"
        )


@dataclass(frozen=True, kw_only=True)
class Row(Point):
    """One line of the result file, before the environment; numbers only where `status` is "ok".

    gb_per_s and tflop_per_s are of the bytes and operations that the loss cannot avoid (roofs.py), whatever the
    provider moved and computed in truth; the shares are of this GPU's measured rates, floor_share is
    floor_ms / step_ms. Errors are relative to the largest entry of the fp64 result.
    """

    provider: str
    status: str
    detail: str = ""
    step_ms: float | None = None
    step_ms_p20: float | None = None
    step_ms_p80: float | None = None
    num_repeats: int | None = None
    steps_per_repeat: int | None = None
    peak_extra_mib: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    hbm_share: float | None = None
    matmul_share: float | None = None
    exp_share: float | None = None
    floor_share: float | None = None
    floor_ms: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None


# TinyMIM's chain, each ViT from the next larger one, whose head widths these are (MAE ViT-L -> B -> S -> T).
PRESETS = {
    "B": {"num_heads": 16, "head_dim_s": 48, "head_dim_t": 64},
    "S": {"num_heads": 12, "head_dim_s": 32, "head_dim_t": 64},
    "T": {"num_heads": 12, "head_dim_s": 16, "head_dim_t": 32},
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a kind of device is asked for unless flags say otherwise; `sweep_batch_size` is of all but batch and presets."""

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
# In the order of what they tell.
SWEEPS = ("presets", "tokens", "batch", "head-dim", "layout", "dtype")


@dataclass(frozen=True)
class Inputs:
    student: Side
    teacher: Side

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.student,) if isinstance(self.student, Tensor) else self.student

    @property
    def num_bytes(self) -> int:
        teacher = (self.teacher,) if isinstance(self.teacher, Tensor) else self.teacher
        return sum(z.nbytes for z in (*self.leaves, *teacher))


def make_inputs(point: Point, device: torch.device, seed: int) -> Inputs:
    """Standard normal projections: logits of standard deviation 1."""
    generator = torch.Generator(device).manual_seed(seed)
    b, h, n = point.batch_size, point.num_heads, point.num_tokens

    def side(head_dim: int) -> Side:
        shape = (b, n, 3 * h * head_dim) if point.layout == "packed" else (b, h, n, head_dim)
        tensors = tuple(
            torch.randn(shape, device=device, generator=generator).to(point.torch_dtype)
            for _ in range(1 if point.layout == "packed" else 3)
        )
        return tensors[0] if point.layout == "packed" else tensors

    inputs = Inputs(student=side(point.head_dim_s), teacher=side(point.head_dim_t))
    for leaf in inputs.leaves:
        leaf.requires_grad_(point.backward)
    return inputs


def make_input_sets(point: Point, device: torch.device) -> list[Inputs]:
    """Three, or as many as are twice as large as the L2 cache of a GPU."""
    sets = [make_inputs(point, device, seed=0)]
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**27) if device.type == "cuda" else 0
    num_sets = max(3, math.ceil(2 * l2_bytes / sets[0].num_bytes))
    return sets + [make_inputs(point, device, seed) for seed in range(1, num_sets)]


def evaluate(provider: Provider, point: Point, inputs: Inputs, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and in mode forward_backward `upstream` times its gradient by the student's tensors."""
    arguments = inputs.student, inputs.teacher, point.num_heads, point.relation_names
    if not point.backward:
        with torch.no_grad():
            return provider(*arguments), ()
    loss = provider(*arguments)
    return loss.detach(), torch.autograd.grad(loss, inputs.leaves, upstream, allow_unused=True)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The loss of all images and the gradient of `images`, in fp64, and the errors of plain PyTorch in the dtype."""

    images: list[int]
    loss: Tensor
    grad: Tensor | None  # (3, images, H, N, D)
    loss_error: float
    grad_error: float | None

    def errors(self, loss: Tensor, grads: tuple[Tensor | None, ...], num_heads: int) -> tuple[float, float | None]:
        if self.grad is None:
            return harness.relative_error(loss, self.loss), None
        side = grads[0] if len(grads) == 1 else tuple(torch.zeros_like(grads[0]) if g is None else g for g in grads)
        grad = torch.stack([z[self.images] for z in projections(side, num_heads).values()])
        return harness.relative_error(loss, self.loss), harness.relative_error(grad, self.grad)

    def passed_by(self, loss_error: float, grad_error: float | None, dtype: torch.dtype) -> bool:
        return harness.passes_gate(loss_error, self.loss_error, dtype) and (
            grad_error is None or harness.passes_gate(grad_error, self.grad_error, dtype)
        )


def make_oracle(point: Point, inputs: Inputs, map_bytes: int = 2**26) -> Oracle:
    """`formula` in fp64 and in the dtype, few heads at a time: the maps of a whole batch would not fit beside a large one.

    Gradients are of the sum of the rows, of the first, the middle and the last image.
    """
    with torch.no_grad():
        student, teacher = (projections(side, point.num_heads) for side in (inputs.student, inputs.teacher))
        student = {name: z.detach() for name, z in student.items()}
    b, h, n = point.batch_size, point.num_heads, point.num_tokens
    fitting = max(1, map_bytes // (8 * n * n))
    images = sorted({0, b // 2, b - 1})
    results = []
    for dtype in (torch.float64, point.torch_dtype):
        loss = torch.zeros((), dtype=torch.float64, device=student["q"].device)
        grads = []
        for image in range(b):
            want_grad = point.backward and image in images
            parts = []
            for heads in (slice(first, first + fitting) for first in range(0, h, fitting)):
                s, t = (
                    {k: z[image : image + 1, heads].to(dtype) for k, z in side.items()} for side in (student, teacher)
                )
                s = {name: z.requires_grad_(want_grad) for name, z in s.items()}
                part = formula(s, t, point.relation_names)
                num_rows = s["q"].shape[1] * n
                loss += part.detach().double() * num_rows / point.num_rows
                if want_grad:
                    upstream = torch.full_like(part, num_rows)
                    by_leaf = torch.autograd.grad(
                        part, list(s.values()), upstream, materialize_grads=True, allow_unused=True
                    )
                    parts.append(torch.stack(by_leaf))
            if want_grad:
                grads.append(torch.cat(parts, dim=2))
        results.append((loss, torch.cat(grads, dim=1) if grads else None))
    (loss, grad), (plain_loss, plain_grad) = results
    return Oracle(
        images=images,
        loss=loss,
        grad=grad,
        loss_error=harness.relative_error(plain_loss, loss),
        grad_error=None if grad is None else harness.relative_error(plain_grad, grad),
    )


def measure(
    point: Point,
    providers: Mapping[str, Provider],
    device: torch.device,
    *,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> list[Row]:
    """One row for each provider: those that pass the gate are timed, those that fail in any way say why."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a compiled function keeps a few shapes only, and then runs as if it were not compiled
    rates = roofs.measured_rates(device, point.torch_dtype) if device.type == "cuda" else None
    columns: dict[str, dict] = {name: {} for name in providers}
    try:
        input_sets = make_input_sets(point, device)
        oracle = make_oracle(point, input_sets[0])
    except Exception as error:
        if not harness.is_out_of_memory(error):
            raise
        # Without its traceback, which keeps tensors alive.
        return [
            make_row(point, name, {"status": harness.OUT_OF_MEMORY, "detail": "the inputs alone"}, None)
            for name in providers
        ]

    upstream = torch.tensor(float(point.num_rows), device=device)
    steps = {}
    for name, provider in providers.items():
        inputs = itertools.cycle(input_sets)

        def step(provider: Provider = provider, inputs: Iterator[Inputs] = inputs) -> object:
            return evaluate(provider, point, next(inputs), upstream)

        try:
            errors = oracle.errors(*step(), point.num_heads)
            columns[name] = dict(zip(("loss_error", "grad_error"), errors))
            if oracle.passed_by(*errors, point.torch_dtype):
                columns[name]["peak_extra_mib"] = harness.peak_extra_mib(step, device)
                steps[name] = step
            else:
                plain = oracle.loss_error, oracle.grad_error
                found, allowed = (", ".join(f"{e:.1e}" for e in pair if e is not None) for pair in (errors, plain))
                columns[name].update(
                    status=harness.FAILED_GATE, detail=f"errors {found}; plain PyTorch's are {allowed}"
                )
        except Exception as error:
            columns[name] = failure(error)
        release(device)

    while steps:
        try:
            times = harness.time_interleaved(steps, device=device, seconds=seconds, num_repeats=num_repeats)
        except harness.StepError as error:
            columns[error.name] = failure(error.__cause__)
            del steps[error.name]
            release(device)
            continue
        for name in steps:
            columns[name].update(status=harness.OK, **times[name].columns())
        break
    return [make_row(point, name, columns[name], rates) for name in providers]


def release(device: torch.device) -> None:
    """Give back what a failed or a finished provider left, so that the next one finds the memory as the first did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(error: BaseException) -> dict[str, str]:
    status = harness.OUT_OF_MEMORY if harness.is_out_of_memory(error) else harness.NOT_AVAILABLE
    return {"status": status, "detail": harness.one_line(error)}


def make_row(point: Point, provider: str, columns: Mapping, rates: roofs.Rates | None) -> Row:
    """With throughput, and shares of the roofs where their rates are known."""
    columns = dict(columns)
    for name in ("loss_error", "grad_error"):
        if columns.get(name) is not None:
            columns[name] = float(f"{columns[name]:.2e}")
    if columns["status"] == harness.OK:
        seconds = columns["step_ms"] / 1e3
        needed = roofs.total(point.relation_names, point.shape, backward=point.backward)
        columns.update(gb_per_s=needed.num_bytes / seconds / 1e9, tflop_per_s=needed.flop / seconds / 1e12)
        if rates is not None:
            shares = {name: ms / columns["step_ms"] for name, ms in roofs.times_ms(needed, rates).items()}
            floor_ms = roofs.floor_ms(point.relation_names, point.shape, rates, backward=point.backward)
            columns.update(
                hbm_share=shares["bytes"],
                matmul_share=shares["matrix unit"],
                exp_share=shares["exponentials"] or None,
                floor_share=floor_ms / columns["step_ms"],
                floor_ms=floor_ms,
            )
        for name in ("gb_per_s", "tflop_per_s", "hbm_share", "matmul_share", "exp_share", "floor_share", "floor_ms"):
            if columns.get(name) is not None:
                columns[name] = float(f"{columns[name]:.4g}")
    return Row(**{field.name: getattr(point, field.name) for field in fields(Point)}, provider=provider, **columns)


def print_table(rows: Sequence[Row]) -> None:
    """One point: its numbers, and how many times as fast ours is as each peer."""
    floor_ms = next((row.floor_ms for row in rows if row.floor_ms), None)
    print(f"\n{rows[0]}" + (f", floor {floor_ms:.4g} ms" if floor_ms else ""))
    columns = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    print(f"  {'provider':<16}" + "".join(f"{title:>12}" for title, _, _ in columns))
    for row in rows:
        if row.status == harness.OK:
            values = (text(getattr(row, name)) if getattr(row, name) is not None else "" for _, name, text in columns)
            print(f"  {row.provider:<16}" + "".join(f"{value:>12}" for value in values))
        else:
            print(f"  {row.provider:<16}{row.status}" + (f" ({row.detail})" if row.detail else ""))
    ratios = ratios_to_peers(rows)
    if ratios:
        print(
            f"  {our_row(rows).provider} is " + ", ".join(f"{x:.3g}x as fast as {name}" for name, x in ratios.items())
        )


def print_summary(rows: Sequence[Row]) -> None:
    """All points: the ratio to every peer, or why there is none."""
    peers = list(dict.fromkeys(row.provider for row in rows if row.provider not in OURS))
    by_point: dict[str, list[Row]] = {}
    for row in rows:
        by_point.setdefault(str(row), []).append(row)
    width = max(map(len, by_point)) + 2
    print(f"\n{'times as fast as':<{width}}{'ours':<9}" + "".join(f"{name:>16}" for name in peers))
    for name, of_point in by_point.items():
        mine, ratios = our_row(of_point), ratios_to_peers(of_point)
        status = {row.provider: row.status for row in of_point}
        cells = (f"{ratios[peer]:.2f}x" if peer in ratios else status.get(peer, "") for peer in peers)
        print(f"{name:<{width}}{mine.provider if mine else '-':<9}" + "".join(f"{cell:>16}" for cell in cells))


def our_row(rows: Sequence[Row]) -> Row | None:
    """The first of ours that has a number."""
    return next((row for ours in OURS for row in rows if row.provider == ours and row.status == harness.OK), None)


def ratios_to_peers(rows: Sequence[Row]) -> dict[str, float]:
    """Times of the peers over ours, by provider."""
    mine = our_row(rows)
    peers = (row for row in rows if mine and row.provider not in OURS and row.status == harness.OK)
    return {row.provider: row.step_ms / mine.step_ms for row in peers}


def significant(value: float) -> str:
    """Four digits."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}" if value >= 1e-3 else f"{value:.1e}"


# Of the table: title, field of a row, how to print it.
COLUMNS = [
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
    custom = bool(flags.keys() & PRESETS["B"].keys())

    def points(sweep: str, presets: Sequence[str], **values) -> Iterator[Point]:
        for relations in args.relations:
            for preset in presets:
                yield Point(
                    sweep=sweep,
                    relations=relations,
                    preset="" if custom else preset,
                    **{"dtype": args.dtype or scale.dtype, **PRESETS[preset], **values, **flags},
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
        "head-dim": lambda: swept("head-dim", head_dim_s=HEAD_DIMS),
        "layout": lambda: swept("layout", layout=LAYOUTS),
        "dtype": lambda: swept("dtype", dtype=DTYPES),
    }
    wanted = SWEEPS if "all" in args.sweep else [name for name in SWEEPS if name in args.sweep]
    planned = []
    for name in wanted:
        modes = args.modes or (MODES[::-1] if name == "presets" else MODES[1:])
        planned += [replace(point, mode=mode) for mode in modes for point in plans[name]()]
    return planned


def run(args: argparse.Namespace, results: harness.ResultFile) -> list[Row]:
    """Measure point by point while the budget lasts; each point's rows are printed and written at once."""
    start_s, longest_s = time.monotonic(), 0.0
    rows: list[Row] = []
    measured: dict[tuple, list[Row]] = {}  # sweeps share points
    for i, point in enumerate(args.points):
        point_start_s = time.monotonic()
        if args.time_budget is not None and point_start_s - start_s + longest_s > args.time_budget:
            print(f"\n--time-budget {args.time_budget:g}: left out " + "; ".join(map(str, args.points[i:])))
            break
        names = [
            name
            for name in args.providers
            if args.all_providers or point.sweep == "presets" or name != "compile_padded"
        ]
        key = replace(point, sweep=""), *names
        if key not in measured:
            measured[key] = measure(
                point,
                {name: PROVIDERS[name] for name in names},
                args.device,
                seconds=args.seconds_per_point or SCALES[args.device.type].seconds_per_point,
                num_repeats=args.num_repeats,
            )
        of_point = [replace(row, sweep=point.sweep) for row in measured[key]]
        for row in of_point:
            results.add(row)
        rows += of_point
        print_table(of_point)
        sys.stdout.flush()
        longest_s = max(longest_s, time.monotonic() - point_start_s)
    return rows


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="default: all")
    parser.add_argument(
        "--sweep", nargs="+", choices=[*SWEEPS, "all"], default=["presets"], help="from the first preset"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: both for presets, else forward_backward")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that the device can run")
    parser.add_argument("--relations", nargs="+", default=["qk+vv"], help="each is timed on its own (default: qk+vv)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--layout", choices=LAYOUTS, help="(B, N, 3 C), or q, k, v as (B, H, N, D); default: packed")
    for name in ("--batch-size", "--num-heads", "--num-tokens", "--head-dim-s", "--head-dim-t"):
        parser.add_argument(name, type=positive, help="instead of the preset's")
    parser.add_argument("--seconds-per-point", type=float, help="how long to repeat (default: 4 on a GPU, 10 on a CPU)")
    parser.add_argument("--num-repeats", type=positive, help="so many, however long they take")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no point that may not end in time")
    parser.add_argument("--output", type=Path, metavar="CSV", help="written point by point")
    args = parser.parse_args(arguments)
    args.device = args.device or harness.default_device()
    if args.device.type not in SCALES:
        parser.error(f"--device: got {args.device}, want cuda or cpu")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but PyTorch sees no GPU; want --device cpu")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
    for relations in args.relations:
        if not all(relation in ("qk", "vv", "qq", "kk") for relation in relations.split("+")):
            parser.error(f"--relations: got {relations!r}, want qk, vv, qq and kk joined by +")
    try:
        args.points = plan(args)
    except ValueError as error:
        parser.error(str(error))
    args.all_providers = args.providers is not None
    args.providers = args.providers or [name for name in PROVIDERS if name != "triton" or args.device.type == "cuda"]
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want at least 1")
    return value


def main() -> int:
    args = parse_args()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    results = harness.ResultFile(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    if args.device.type == "cpu":
        waiting = ", ".join(f"{name}={os.environ.get(name)}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
        print(
            f"On the CPU ({waiting}): chunked against its peers. Not measured here:\n"
            "the Triton kernels, and shares of a GPU's roofs."
        )
    else:
        dtype = getattr(torch, args.dtype or SCALES["cuda"].dtype)
        print(roofs.describe(args.device, dtype, roofs.measured_rates(args.device, dtype)))
    rows: list[Row] = []
    try:
        rows = run(args, results)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {args.output or 'the output above'} holds what was measured")
        return 130
    print_summary(rows)
    if args.output:
        print(
            f"\n{args.output}: {len(rows)} rows; python benchmarks/plot.py {args.output} --output-dir {args.output.parent}"
        )
    broken = [
        row for row in rows if row.provider in OURS and row.status in (harness.FAILED_GATE, harness.NOT_AVAILABLE)
    ]
    for row in broken:
        print(f"{row.provider}: {row.status} at {row}: {row.detail}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
