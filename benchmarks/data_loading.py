"""Images a second that come out of the loaders, against what a user would write with torchvision.

python benchmarks/data_loading.py                                    # draws JPEGs of ImageNet's size
python benchmarks/data_loading.py --data-path /data/imagenet --time-budget 600 --output results.csv

Providers: "dali_mixed" (decoding on the GPU) or "dali_cpu", "fallback" (--loader torchvision of this package), and a
    data
set as a user would write it, "torchvision" with PIL images and transforms, "torchvision_v2" with tensors and
transforms.v2. All give normalised views on the device: a random resized crop, and with two views the same crop with
colour jitter. One of ours whose views differ from PIL's gets no number.
Each repeat starts a loader anew and times it once it runs; providers take turns. Files are in the page cache. Workers
are DALI's threads or DataLoader's processes; what both cost is the CPU time per image, of all threads and processes.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import io, transforms
from torchvision.transforms import v2

import harness
import sweep
from tinymim_fast.batches import BatchPlan
from tinymim_fast.data import ImageIndex, build_loader, find_images
from tinymim_fast.data.loader import TrainLoader
from tinymim_fast.data.pack import pack
from tinymim_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, TrainView
from tinymim_fast.errors import InputError

VIEW = TrainView(img_size=224)
# Of the difference from PIL and torchvision over a batch, units of 0..255; the tests hold tighter ones.
MAX_MEAN_DIFFERENCE, MAX_P99_DIFFERENCE = 1.0, 10.0
Batches = Iterator[Sequence[torch.Tensor]]
SWEEPS = ("views", "source", "pause", "workers", "batch")
# Columns of a row behind its status. step_ms: from one batch to the next. cpu_ms_per_image: of this process and its
# workers, start and end included. wait_share: of the time, in which the consumer stood still; with pause_ms, what a
# training loop calls data_wait.
COLUMNS = (
    *("step_ms", "step_ms_p20", "step_ms_p80", "num_repeats", "images_per_s", "cpu_ms_per_image", "wait_share"),
    *("mean_difference", "p99_difference", "kib_per_image", "megapixels_per_image"),
)


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    """What is measured: `source` folder or tar, pause_ms of a step between two batches."""

    benchmark: str = "data_loading"
    source: str = "folder"
    views: int = 2
    batch_size: int = 64
    num_workers: int
    pause_ms: float = 0.0

    def __str__(self) -> str:
        pause = f", steps of {self.pause_ms:g} ms" if self.pause_ms else ""
        views = f"{self.views} view{'s' * (self.views > 1)}"
        return f"{self.source}, {views}, batch {self.batch_size}, {self.num_workers} workers{pause}"


class UserDataset(Dataset):
    """What a user of torchvision writes: ImageFolder with one crop for both views."""

    def __init__(self, index: ImageIndex, views: int):
        self.files = [index.file(i) for i in range(len(index))]
        self.crop_and_flip, jitter, self.normalize = self.transforms()
        self.jitter = jitter if views == 2 else None

    def transforms(self) -> Sequence[Callable]:
        """On PIL images: crop with flip, jitter, tensor and normalisation."""
        bicubic = transforms.InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(VIEW.img_size, scale=VIEW.scale, interpolation=bicubic)
        normalize = transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return (
            transforms.Compose([crop, transforms.RandomHorizontalFlip()]),
            transforms.ColorJitter(*VIEW.color_jitter),
            transforms.Compose([transforms.ToTensor(), normalize]),
        )

    def read(self, file: str) -> Any:
        """As torchvision's ImageFolder does."""
        with open(file, "rb") as opened:
            return Image.open(opened).convert("RGB")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        image = self.crop_and_flip(self.read(self.files[i]))
        views = [image] if self.jitter is None else [image, self.jitter(image)]
        return tuple(self.normalize(view) for view in views)


class UserTensorDataset(UserDataset):
    """The same with tensors from file to view: torchvision's own decoder and its transforms of today."""

    def transforms(self) -> Sequence[Callable]:
        """On tensors of uint8."""
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(VIEW.img_size, scale=VIEW.scale, interpolation=bicubic, antialias=True)
        normalize = v2.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return (
            v2.Compose([crop, v2.RandomHorizontalFlip()]),
            v2.ColorJitter(*VIEW.color_jitter),
            v2.Compose([v2.ToDtype(torch.float32, scale=True), normalize]),
        )

    def read(self, file: str) -> Any:
        """Bytes to (3, H, W) in one call."""
        return io.decode_image(file, mode=io.ImageReadMode.RGB)


USER_DATASETS = {"torchvision": UserDataset, "torchvision_v2": UserTensorDataset}


def user_batches(name: str, index: ImageIndex, point: Point, num_batches: int, device: torch.device) -> Batches:
    """A DataLoader over a user's data set."""
    dataset = USER_DATASETS[name](index, point.views)
    loader = DataLoader(
        dataset,
        batch_size=point.batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=num_batches * point.batch_size),
        num_workers=point.num_workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    for views in loader:
        yield [view.to(device, non_blocking=True) for view in views]


def our_batches(loader: str, index: ImageIndex, point: Point, num_batches: int, device: torch.device) -> Batches:
    """Of `build_loader`, as a run starts it."""
    with make_loader(index, point, loader, device) as train_loader:
        yield from train_loader.batches(0, num_batches)


def make_loader(index: ImageIndex, point: Point, loader: str, device: torch.device) -> TrainLoader:
    """The loader of one rank."""
    gpu = device.type == "cuda" and loader == "dali"
    jitter = VIEW.color_jitter if point.views == 2 else None
    view = replace(VIEW, color_jitter=jitter, dtype=torch.float16 if gpu else torch.float32)
    batches = BatchPlan(micro_batch_size=point.batch_size)
    return build_loader(index, view, batches, loader=loader, seed=0, device=device, workers=point.num_workers)


PROVIDERS = {
    "dali_mixed": partial(our_batches, "dali"),
    "dali_cpu": partial(our_batches, "dali"),
    "fallback": partial(our_batches, "torchvision"),
    **{name: partial(user_batches, name) for name in USER_DATASETS},
}


def gate(provider: str, index: ImageIndex, point: Point, device: torch.device) -> dict:
    """Columns of a provider whose views of some images were held against PIL's and torchvision's."""
    if provider in USER_DATASETS:
        return {"status": harness.OK}
    small = replace(point, batch_size=min(32, len(index)), num_workers=1)
    with make_loader(index, small, "torchvision", torch.device("cpu")) as exact:
        wanted = next(exact.batches(0, 1))
    batches = PROVIDERS[provider](index, small, 1, device)
    got = [view.float().cpu() for view in next(batches)]
    batches.close()
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    differences = torch.stack([(a - b).abs() * std for a, b in zip(got, wanted)]).flatten()
    mean = differences.mean().item()
    p99 = differences.kthvalue(math.ceil(0.99 * len(differences))).values.item()
    passed = mean <= MAX_MEAN_DIFFERENCE and p99 <= MAX_P99_DIFFERENCE
    columns = {"mean_difference": round(mean, 3), "p99_difference": round(p99, 2)}
    return {**columns, "status": harness.OK if passed else harness.FAILED_GATE}


def cpu_s() -> float:
    """Of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def num_batches_of(point: Point, min_images: int) -> int:
    """Of a repeat: a round, in which each worker makes a batch, and as many as hold `min_images`, two at least."""
    return point.num_workers * (1 + max(2, math.ceil(min_images / (point.num_workers * point.batch_size))))


def take(provider: str, index: ImageIndex, point: Point, args: argparse.Namespace) -> tuple[float, float, float]:
    """One repeat: step_ms, cpu_ms_per_image, wait_share. The first round, which starts the workers, is not timed."""
    workers, num_batches = point.num_workers, num_batches_of(point, args.min_images)
    cpu_before, waited = cpu_s(), 0.0
    batches = PROVIDERS[provider](index, point, num_batches, args.device)
    for number in range(num_batches):
        asked = time.perf_counter()
        next(batches)
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        got = time.perf_counter()
        if number >= workers:
            waited += got - asked
        if point.pause_ms:
            time.sleep(point.pause_ms / 1e3)
        if number == workers - 1:
            began = time.perf_counter()
    elapsed = time.perf_counter() - began
    assert next(batches, None) is None
    cpu_ms = 1e3 * (cpu_s() - cpu_before)
    return 1e3 * elapsed / (num_batches - workers), cpu_ms / (num_batches * point.batch_size), waited / elapsed


def measure(index: ImageIndex, point: Point, args: argparse.Namespace) -> Mapping[str, Mapping[str, Any]]:
    """The columns of each provider that the point says anything about; providers take turns."""
    columns: dict[str, dict[str, Any]] = {}
    taken: dict[str, list[tuple[float, float, float]]] = {}
    for provider in args.providers:
        if provider in USER_DATASETS and point.source != "folder":
            continue
        try:
            columns[provider] = gate(provider, index, point, args.device)
        except Exception as error:
            columns[provider] = harness.failure(error)
        if columns[provider]["status"] == harness.OK:
            taken[provider] = []
    for _ in range(args.num_repeats):
        for provider, repeats in taken.items():
            repeats.append(take(provider, index, point, args))
    pixels = index.sizes.astype(np.int64).prod(axis=1)
    for provider, repeats in taken.items():
        step_ms, cpu_ms, waits = zip(*repeats)
        times = harness.percentiles(list(step_ms))
        columns[provider] |= times | {
            "num_repeats": len(repeats),
            "images_per_s": round(1e3 * point.batch_size / times["step_ms"], 1),
            "cpu_ms_per_image": round(statistics.median(cpu_ms), 3),
            "wait_share": round(statistics.median(waits), 3),
        }
    for found in columns.values():
        found["kib_per_image"] = round(args.kib_per_image, 1)
        found["megapixels_per_image"] = round(float(pixels.mean()) / 1e6, 3)
    return columns


def draw_photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels and some 110 KB, as ImageNet's are: noise whose power falls with frequency as in
    photographs.
    """

    def draw(number: int) -> None:
        rng = np.random.default_rng(number)
        height, width = (375, 500) if rng.random() < 0.75 else (500, 375)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.15
        planes = []
        for strength in (52.0, 20.0, 14.0):  # brightness and two colours
            noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * amplitude, s=(height, width))
            planes.append(strength * noise / noise.std())
        luma, red, blue = planes
        rgb = 118 + np.stack([luma + red, luma - 0.5 * (red + blue), luma + blue], axis=-1)
        image = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
        image.save(folder / f"class_{number % 10}" / f"{number:05d}.jpg", quality=92)

    for label in range(10):
        (folder / f"class_{label}").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(draw, range(count)))


def prepare(args: argparse.Namespace, scratch: Path) -> dict[str, ImageIndex]:
    """The images as a folder, and packed where the points want it."""
    folder = scratch / "folder" / "train"
    if args.data_path is None:
        draw_photographs(folder, args.num_images)
    else:
        try:
            whole = find_images(args.data_path, split="train", workers=os.cpu_count())
            if whole.shards:
                raise InputError(f"got {args.data_path}, which holds shards, want an image folder; they are made here")
        except InputError as error:
            error.argument = "--data-path"
            raise
        chosen = np.random.default_rng(0).permutation(len(whole))[: args.num_images]
        for i in chosen:  # links: what is measured is one set, as a folder and packed
            link = folder / whole.paths[i]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(whole.file(i)).absolute())
    indexes = {"folder": find_images(scratch / "folder", split="train", workers=os.cpu_count())}
    if any(point.source == "tar" for point in args.points):
        pack(scratch / "folder", scratch / "tar", workers=os.cpu_count())
        indexes["tar"] = find_images(scratch / "tar", split="train", workers=os.cpu_count())
    files = [indexes["folder"].file(i) for i in range(len(indexes["folder"]))]
    args.kib_per_image = sum(map(os.path.getsize, files)) / len(files) / 1024
    for file in files:
        Path(file).read_bytes()  # into the page cache
    return indexes


def plan(args: argparse.Namespace) -> list[Point]:
    """The most important first: what a distillation uses, at all cores; then one thing changed at a time."""
    base = Point(sweep="views", num_workers=args.workers[-1], batch_size=args.batch_sizes[0])
    varied = {
        "views": ("views", (2, 1)),
        "source": ("source", ("folder", "tar")),
        "pause": ("pause_ms", args.pause_ms),
        "workers": ("num_workers", args.workers),
        "batch": ("batch_size", args.batch_sizes),
    }
    chosen = [(name, *varied[name]) for name in SWEEPS if name in args.sweep]
    return [replace(base, sweep=name, **{column: value}) for name, column, values in chosen for value in values]


# Of the table: title, column of a row, how to print it.
SHOWN = [
    ("images/s", "images_per_s", "{:,.0f}".format),
    ("batch ms", "step_ms", "{:,.0f}".format),
    ("20 %", "step_ms_p20", "{:,.0f}".format),
    ("80 %", "step_ms_p80", "{:,.0f}".format),
    ("CPU ms/image", "cpu_ms_per_image", "{:.2f}".format),
    ("waiting", "wait_share", "{:.0%}".format),
    ("mean diff", "mean_difference", str),
    ("p99 diff", "p99_difference", str),
]


def show(rows: Sequence[sweep.Row]) -> None:
    """One point."""
    print(f"\n{Point(**{name: rows[0][name] for name in Point.__dataclass_fields__})}")
    sweep.print_columns(rows, SHOWN)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with args.points as planned from them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sweep.add_flags(parser, PROVIDERS)
    parser.set_defaults(num_repeats=5)
    add, positive = parser.add_argument, sweep.positive
    add("--data-path", help="image folder; default: drawn JPEGs of ImageNet's size")
    add("--num-images", type=positive, default=1024, help="drawn, or taken from --data-path (default: 1024)")
    add("--sweep", nargs="+", choices=SWEEPS, default=SWEEPS, help="default: all")
    add("--batch-sizes", nargs="+", type=positive, default=[64, 256, 1024], help="the first for all sweeps")
    add("--workers", nargs="+", type=positive, help="default: 1, 2, 4 to all cores; the last for all sweeps")
    add("--pause-ms", nargs="+", type=float, default=[100.0, 250.0], help="length of a training step, for the waiting")
    add("--min-images", type=positive, help="in a repeat (default: 512; 8192 on a GPU)")
    args = parser.parse_args(arguments)
    sweep.read_device(parser, args)
    cores = len(os.sched_getaffinity(0))
    args.workers = args.workers or sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    args.min_images = args.min_images or (8192 if args.device.type == "cuda" else 512)
    cannot = "dali_cpu" if args.device.type == "cuda" else "dali_mixed"
    args.providers = args.providers or [name for name in PROVIDERS if name != cannot]
    if cannot in args.providers:
        parser.error(f"--providers: got {cannot}, which can't run on --device {args.device}")
    args.points = plan(args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw or link the images, measure, print, write the rows; the exit code."""
    args = parse_args(arguments)
    torch.set_num_threads(1)  # what is measured are the loaders' own threads and processes
    results = sweep.Results(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    with tempfile.TemporaryDirectory(prefix="data_loading_") as scratch:
        try:
            indexes = prepare(args, Path(scratch))
        except InputError as error:
            print(f"data_loading.py: {error}", file=sys.stderr)
            return 2
        num_images = len(indexes["folder"])
        for point in args.points:
            if point.batch_size > num_images:
                print(f"left out, for there are {num_images} images: {point}")
        print(
            f"{num_images} JPEGs, {args.kib_per_image:.0f} KiB each; to {args.device}, {args.num_repeats} repeats of "
            f"{args.min_images} images or more, medians"
        )
        try:
            sweep.run(
                [point for point in args.points if point.batch_size <= num_images],
                lambda point: measure(indexes[point.source], point, args),
                results,
                columns=COLUMNS,
                show=show,
                budget_s=args.time_budget,
                cost=lambda point: num_batches_of(point, args.min_images) * point.batch_size,
            )
        except KeyboardInterrupt:
            return sweep.finish(results, interrupted=True)
    return sweep.finish(results)


if __name__ == "__main__":
    sys.exit(main())
