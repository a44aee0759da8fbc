"""Whole distillation steps on random images: the training loop's own step against the paper's loop, and its parts.

python benchmarks/train_step.py                                  # the recipes on a GPU, the small pairs on a CPU
python benchmarks/train_step.py --pairs B-S --precisions bf16 --batch-sizes 512 --output train_step.csv
python benchmarks/train_step.py --sweep zero batch data          # ZeRO stages, batch sizes, images from the loader
python benchmarks/train_step.py --sweep students                 # two students of one teacher pass, or one by one
python benchmarks/train_step.py --sweep settings                 # compile, attention, teacher's precision, CUDA graph

Providers (step_loops.py) take turns, on three batches in rotation: "official_loop", as the paper's; "plain", a
PyTorch loop with this package's teacher and loss; "ours", what `train.py` runs. One whose loss or gradient of the patch
embedding is further from the step in fp64 than plain PyTorch's in the same dtypes of student and teacher, by the rule
of the tests, gets no number; int8 and fp8 teachers are held to bf16's.
"""

from __future__ import annotations

import os

# Before torch starts OpenMP, as in train.py: a short spin was fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that counts memory complains of a missing GPU

import argparse
import contextlib
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import harness
import roofs
import sweep
from providers import formula, projections
from step_loops import PRECISIONS, PROVIDERS, VARIANTS, Loop, Views, config_of, synchronize
from step_roofs import PAIRS, RELATIONS
from step_students import STUDENTS, measure_students
from tinymim_fast import engine as engines
from tinymim_fast.data import build_loader, find_images
from tinymim_fast.data.loader import TrainLoader
from tinymim_fast.distributed import World
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.tasks.distill import DistillConfig, build_task, load_teacher
from tinymim_fast.training.task import train_view

SWEEPS = ("pairs", "settings", "zero", "batch", "data", "students")
PARTS = ("data_ms", "teacher_ms", "forward_ms", "backward_ms", "optimizer_ms")
# Columns of a row behind its status. The parts are of steps on their own, with the device waited for between them;
# data_ms is the wait for a batch in the steps that are timed. loss_ms is the loss and its gradient alone, part of
# forward_ms and backward_ms. tflop_per_s counts what the step cannot avoid (step_roofs.py), matmul_share is that of
# this device's measured products, floor_share is floor_ms / step_ms.
COLUMNS = (
    *(*sweep.TIMES, "images_per_s", "peak_extra_mib", *PARTS, "loss_ms"),
    *("tflop_per_s", "matmul_share", "floor_share", "floor_ms", "teacher_dtype", "loss_error", "grad_error"),
)
SHOWN = [
    ("images/s", "images_per_s", "{:.2f}".format),
    ("ms", "step_ms", "{:.4g}".format),
    ("20 %", "step_ms_p20", "{:.4g}".format),
    ("80 %", "step_ms_p80", "{:.4g}".format),
    ("data", "data_ms", "{:.4g}".format),
    ("teacher", "teacher_ms", "{:.4g}".format),
    ("forward", "forward_ms", "{:.4g}".format),
    ("backward", "backward_ms", "{:.4g}".format),
    ("optimizer", "optimizer_ms", "{:.4g}".format),
    ("loss", "loss_ms", "{:.4g}".format),
    ("teacher is", "teacher_dtype", str),
    ("extra MiB", "peak_extra_mib", "{:.0f}".format),
    ("of matmul", "matmul_share", "{:.0%}".format),
    ("of floor", "floor_share", "{:.0%}".format),
]


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    """What is measured; ZeRO is ours alone, and so are images that the loader draws from JPEGs.

    The teacher's precision is not the official loop's, whose teacher has the student's. `compared` is "loops", or
    "settings" of ours beside the official loop.
    """

    benchmark: str = "train_step"
    sweep: str = "pairs"
    pair: str
    precision: str = "bf16"
    teacher_precision: str = "auto"
    zero_stage: int = 1
    batch_size: int
    img_size: int = 224
    data: str = "random"
    compared: str = "loops"

    def __str__(self) -> str:
        teacher = "" if self.teacher_precision == "auto" else f", teacher {self.teacher_precision}"
        batch = f"batch {self.batch_size}, {self.data} images"
        return f"{self.pair} {self.precision}{teacher}, ZeRO {self.zero_stage}, {batch}"


class Waited:
    """An iterator, and the milliseconds for which it was waited."""

    def __init__(self, batches: Iterator[Views]):
        self.batches, self.ms = batches, []

    def __iter__(self) -> Iterator[Views]:
        return self

    def __next__(self) -> Views:
        asked = time.perf_counter()
        views = next(self.batches)
        self.ms.append(1e3 * (time.perf_counter() - asked))
        return views


def loaded(config: DistillConfig, world: World, folder: Path, workers: int) -> TrainLoader:
    """The loader of a run, over photographs that data_loading.py draws."""
    from data_loading import draw_photographs

    images = folder / "images" / "train"
    if not images.exists():
        draw_photographs(images, 1024)
    index = find_images(folder / "images", split="train", workers=workers)
    view = train_view(config, world, color_jitter=config.color_jitter)
    return build_loader(index, view, config.batch_plan(1), seed=0, device=world.device, workers=workers)


def by_formula(
    config: DistillConfig, world: World, views: Views, dtypes: Sequence[tuple[torch.dtype, torch.dtype]]
) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of the patch embedding by the formula, for each pair of the student's and teacher's dtypes."""
    torch.manual_seed(config.seed)
    student = build_task(replace(config, attention="math"), world, None).model.student.to(world.device).eval()
    teacher, heads = Taps(load_teacher(config)[0], [Place("qkv", config.target_block)]), config.relation_heads
    teacher.to(world.device).eval()
    results, tapped = [], {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # each holds what the next one needs
        with torch.no_grad():
            (tapped[dtype],) = teacher.to(dtype)(views[0].to(dtype)).values()
    for dtype_s, dtype_t in dtypes:  # fp64 first holds what fp32 was
        (qkv_s,) = student.to(dtype_s)(views[1].to(dtype_s)).values()
        loss = formula(projections(qkv_s, heads), projections(tapped[dtype_t], heads), RELATIONS)
        results.append((loss.detach(), torch.autograd.grad(loss, student.model.patch_embed.proj.weight)[0]))
    return results


def gate(
    loop: Loop,
    views: Views,
    exact: Sequence[Tensor],
    allowed: Mapping[torch.dtype, Sequence[float]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Columns: the errors without drop path, and whether the rule of the tests lets them pass.

    Args:
        views: the images of `exact` again and again, whose loss and gradient the batch then has: fp64 would not fit.
        exact: from `by_formula` in fp64.
        allowed: the errors of `by_formula` in `dtype`, by the dtype of the teacher.
        dtype: the student's.
    """
    dtype_t = PRECISIONS.get(loop.teacher_precision, torch.bfloat16)
    plain = allowed[dtype_t]
    lower = max((dtype, dtype_t), key=harness.FLOORS.__getitem__)
    loop.student.eval()
    with torch.no_grad():
        inputs = loop.prepare(views)
    loss = loop.forward(*inputs)
    loop.backward(loss)
    found = loss.detach(), loop.gradient()
    loop.update()
    loop.student.train()
    errors = [harness.relative_error(a, b) for a, b in zip(found, exact)]
    columns = {name: float(f"{error:.2e}") for name, error in zip(("loss_error", "grad_error"), errors)}
    columns["teacher_dtype"] = loop.teacher_precision
    if all(harness.passes_gate(error, plain_error, lower) for error, plain_error in zip(errors, plain)):
        return {**columns, "status": harness.OK}
    detail = "plain PyTorch's errors: " + ", ".join(f"{error:.1e}" for error in plain)
    return {**columns, "status": harness.FAILED_GATE, "detail": detail}


def parts_ms(loop: Loop, batches: Iterator[Views], device: torch.device, num_repeats: int = 3) -> dict[str, float]:
    """Medians of the columns PARTS but the first, the device waited for between them."""

    def now() -> float:
        synchronize(device)
        return 1e3 * time.perf_counter()

    taken = []
    for _ in range(num_repeats):
        marks = [now()]
        with torch.no_grad():
            inputs = loop.prepare(next(batches))
        marks.append(now())
        loss = loop.forward(*inputs)
        marks.append(now())
        loop.backward(loss)
        marks.append(now())
        loop.update()
        marks.append(now())
        taken.append([end - begin for begin, end in itertools.pairwise(marks)])
    return {name: round(statistics.median(times), 3) for name, times in zip(PARTS[1:], zip(*taken))}


def measure(
    point: Point,
    providers: Sequence[str],
    world: World,
    folder: Path,
    opened: contextlib.ExitStack,
    *,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The columns of each provider; teachers and images go to `folder`, loaders are closed with `opened`."""
    device, dtype, pair = world.device, PRECISIONS[point.precision], PAIRS[point.pair]
    names = "batch_size", "precision", "teacher_precision", "zero_stage", "img_size"
    options = {name: getattr(point, name) for name in names}
    config = config_of(point.pair, folder, **options)
    generator = torch.Generator(device).manual_seed(2)
    as_loaded = torch.float16 if config.bf16 and device.type == "cuda" else torch.float32

    def views(batch_size: int) -> Views:
        shape = batch_size, 3, point.img_size, point.img_size
        return tuple(torch.randn(shape, device=device, generator=generator).to(as_loaded) for _ in range(2))

    few = views(2 - point.batch_size % 2)
    teachers = torch.float32, torch.bfloat16
    exact, *in_dtypes = by_formula(config, world, few, [(torch.float64,) * 2, *((dtype, t) for t in teachers)])
    allowed = {t: [harness.relative_error(a, b) for a, b in zip(of, exact)] for t, of in zip(teachers, in_dtypes)}
    repeated = tuple(view.repeat(point.batch_size // len(few[0]), 1, 1, 1) for view in few)

    loops: dict[str, Loop] = {}
    batches = Waited(itertools.cycle([views(point.batch_size) for _ in range(3)]))
    if point.data == "loaded":
        loader = opened.enter_context(loaded(config, world, folder, len(os.sched_getaffinity(0))))
        batches = Waited(loader.batches(0, 10**6))

    def checked(name: str) -> dict[str, Any]:
        loops[name] = (PROVIDERS | VARIANTS)[name](config, world, opened)
        return gate(loops[name], repeated, exact, allowed, dtype)

    timing = {"device": device, "num_repeats": num_repeats}
    steps = {name: lambda name=name: loops[name].step(batches) for name in providers}
    measured = harness.measure(steps, checked, seconds=seconds, **timing)
    passed = {name: loops[name] for name, columns in measured.items() if columns["status"] == harness.OK}
    data_ms = round(statistics.median(batches.ms), 3) if batches.ms else None
    if not passed:
        return measured
    shape = point.batch_size, next(iter(passed.values())).student.num_tokens
    qkv_s, qkv_t = (torch.randn(*shape, 3 * vit.width, device=device).to(dtype) for vit in (pair.student, pair.teacher))
    qkv_s.requires_grad_()
    losses = {
        name: lambda loop=loop: torch.autograd.grad(loop.loss(qkv_s, qkv_t), qkv_s) for name, loop in passed.items()
    }
    of_loss = harness.time_interleaved(losses, seconds=seconds / 4, **timing)
    flop, flop_per_s = pair.flop(*shape), 1e12 * roofs.matmul_tflop_per_s(device, dtype)
    for name, loop in passed.items():
        found = measured[name]
        step_ms = found["step_ms"]
        found |= {"data_ms": data_ms, **parts_ms(loop, batches, device)}
        found["loss_ms"] = of_loss[name]["step_ms"]
        found["images_per_s"] = round(1e3 * point.batch_size / step_ms, 2)
        found["tflop_per_s"] = round(flop / step_ms / 1e9, 3)
        found["matmul_share"] = round(1e12 * found["tflop_per_s"] / flop_per_s, 4)
        if device.type == "cuda":
            floor_ms = sum(pair.floors_ms(point.batch_size, roofs.measured_rates(device, dtype), shape[1]).values())
            found["floor_ms"], found["floor_share"] = round(floor_ms, 4), round(floor_ms / step_ms, 4)
    return measured


def show(rows: Sequence[sweep.Row]) -> None:
    """One point."""
    print(f"\n{Point(**{name: rows[0][name] for name in Point.__dataclass_fields__})}")
    sweep.print_columns(rows, SHOWN)


def plan(args: argparse.Namespace) -> list[Point]:
    """The most important first: pairs and precisions; then one thing changed at a time, of the first pair."""
    base = Point(pair=args.pairs[0], precision=args.precisions[0], batch_size=args.batch_sizes[0])
    points = {
        "pairs": [replace(base, pair=pair, precision=p) for p in args.precisions for pair in args.pairs],
        "settings": [replace(base, sweep="settings", compared="settings")],
        "zero": [replace(base, sweep="zero", zero_stage=stage) for stage in (0, 1, 2, 3)],
        "batch": [replace(base, sweep="batch", batch_size=size) for size in args.batch_sizes],
        "data": [replace(base, sweep="data", data=data) for data in ("random", "loaded")],
        "students": [replace(base, sweep="students", pair=STUDENTS, precision=p) for p in args.precisions],
    }
    return [point for name in SWEEPS if name in args.sweep for point in points[name]]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with args.points as planned from them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sweep.add_flags(parser, PROVIDERS | VARIANTS)
    add = parser.add_argument
    add("--sweep", nargs="+", choices=SWEEPS, default=["pairs"], help="default: pairs")
    add("--pairs", nargs="+", choices=list(PAIRS), help="default: the recipes on a GPU, S-T and B-T on a CPU")
    add("--precisions", nargs="+", choices=list(PRECISIONS), help="default: bf16, and on a CPU fp32 too")
    add("--teacher-precision", choices=["auto", "fp32", "bf16", "int8", "fp8"], default="auto", help="default: auto")
    add("--batch-sizes", nargs="+", type=sweep.positive, help="the first for all sweeps (default: 256; 16 on a CPU)")
    add("--img-size", type=sweep.positive, default=224)
    add("--seconds-per-point", type=float, help="how long to repeat (default: 6 on a GPU, 30 on a CPU)")
    args = parser.parse_args(arguments)
    sweep.read_device(parser, args)
    cuda = args.device.type == "cuda"
    args.pairs = args.pairs or (["L-B", "B-S", "S-T"] if cuda else ["S-T", "B-T"])
    args.precisions = args.precisions or (["bf16"] if cuda else ["bf16", "fp32"])
    args.batch_sizes = args.batch_sizes or ([256, 64, 128, 512] if cuda else [16, 4])
    args.seconds_per_point = args.seconds_per_point or (6.0 if cuda else 30.0)
    options = {"img_size": args.img_size, "teacher_precision": args.teacher_precision}
    args.points = [replace(point, **options) for point in plan(args)]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows; the exit code."""
    args = parse_args(arguments)
    torch._dynamo.config.recompile_limit = 64  # providers compile the same blocks, each for its own settings
    logging.getLogger("tinymim_fast").setLevel(logging.ERROR)  # an untrained teacher's file says nothing of its heads
    results = sweep.Results(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    # One process on the device that was asked for, whatever the launcher's accelerator is.
    world = replace(engines.start(), device=args.device)

    settings = ["official_loop", "ours", *VARIANTS]

    def measured(point: Point) -> dict[str, dict[str, Any]]:
        of_point = ["ours"] if point.sweep in ("zero", "data") else list(PROVIDERS)
        names = args.providers or (settings if point.compared == "settings" else of_point)
        timing = {"seconds": args.seconds_per_point, "num_repeats": args.num_repeats}
        with contextlib.ExitStack() as opened:
            if point.sweep == "students":
                return measure_students(point, world, Path(scratch), opened, **timing)
            return measure(point, names, world, Path(scratch), opened, **timing)

    interrupted = False
    with tempfile.TemporaryDirectory(prefix="train_step_") as scratch:
        try:
            sweep.run(args.points, measured, results, columns=COLUMNS, show=show, budget_s=args.time_budget)
        except KeyboardInterrupt:
            interrupted = True
    engines.stop()
    return sweep.finish(results, interrupted)


if __name__ == "__main__":
    sys.exit(main())
