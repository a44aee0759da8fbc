"""Images a second that come out of the loaders, against what a user would write with torchvision.

python benchmarks/data_loading.py                                    # draws JPEGs of ImageNet's size
python benchmarks/data_loading.py --data-path /data/imagenet --time-budget 600 --output results.csv

Providers: "dali_mixed" (decoding on the GPU) or "dali_cpu", "fallback" (--loader torchvision of this package), and a data
set as a user would write it, "torchvision" with PIL images and transforms, "torchvision_v2" with tensors and transforms.v2.
All give normalised views on the device: a random resized crop, and with two views the same crop with colour jitter. One of
ours whose views differ from PIL's gets no number.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import io, transforms
from torchvision.transforms import v2

import harness
from tinymim_fast.batches import BatchPlan
from tinymim_fast.data import ImageIndex, build_loader, find_images
from tinymim_fast.data.pack import pack
from tinymim_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, TrainView
from tinymim_fast.errors import InputError

IMG_SIZE, SCALE, JITTER = 224, (0.2, 1.0), 0.4
# Of the difference from PIL and torchvision over a batch, units of 0..255; the tests hold tighter ones.
MAX_MEAN_DIFFERENCE, MAX_P99_DIFFERENCE = 1.0, 10.0
CROP, FULL = "crop", "full"
Batches = Iterator[Sequence[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured: `source` folder or tar, `decode` crop or full (DALI), pause_ms of a step between two batches."""

    benchmark: str = "data_loading"
    sweep: str
    source: str = "folder"
    decode: str = CROP
    views: int = 2
    batch_size: int = 64
    num_workers: int
    pause_ms: float = 0.0

    def __str__(self) -> str:
        pause = f", steps of {self.pause_ms:g} ms" if self.pause_ms else ""
        return (
            f"{self.source}, decode {self.decode}, {self.views} view{'s' * (self.views > 1)}, "
            f"batch {self.batch_size}, {self.num_workers} workers{pause}"
        )


@dataclass(frozen=True, kw_only=True)
class Row(Point):
    """One line of the result file, before the environment; numbers only where `status` is "ok".

    step_ms: from one batch to the next. cpu_ms_per_image: of this process and its workers, start and end included.
    wait_share: of the time, in which the consumer stood still; with pause_ms, what a training loop calls data_wait.
    """

    provider: str
    status: str
    detail: str = ""
    step_ms: float | None = None
    step_ms_p20: float | None = None
    step_ms_p80: float | None = None
    num_repeats: int | None = None
    images_per_s: float | None = None
    cpu_ms_per_image: float | None = None
    wait_share: float | None = None
    mean_difference: float | None = None
    p99_difference: float | None = None
    kib_per_image: float | None = None
    megapixels_per_image: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Of one repeat."""

    step_ms: float
    cpu_ms_per_image: float
    wait_share: float


class UserDataset(Dataset):
    """What a user of torchvision writes: ImageFolder with one crop for both views."""

    def __init__(self, index: ImageIndex, views: int):
        self.files = [index.file(i) for i in range(len(index))]
        self.crop = transforms.RandomResizedCrop(
            IMG_SIZE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
        )
        self.flip = transforms.RandomHorizontalFlip()
        self.jitter = transforms.ColorJitter(JITTER, JITTER, JITTER) if views == 2 else None
        self.to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        with open(self.files[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = self.flip(self.crop(image))
        views = [image] if self.jitter is None else [image, self.jitter(image)]
        return tuple(self.to_tensor(view) for view in views)


class UserTensorDataset(Dataset):
    """The same with tensors from file to view: torchvision's own decoder and its transforms of today."""

    def __init__(self, index: ImageIndex, views: int):
        self.files = [index.file(i) for i in range(len(index))]
        self.crop_and_flip = v2.Compose(
            [
                v2.RandomResizedCrop(IMG_SIZE, scale=SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.jitter = v2.ColorJitter(JITTER, JITTER, JITTER) if views == 2 else None
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        image = self.crop_and_flip(io.decode_image(self.files[i], mode=io.ImageReadMode.RGB))
        views = [image] if self.jitter is None else [image, self.jitter(image)]
        return tuple(self.normalize(view) for view in views)


USER_DATASETS = {"torchvision": UserDataset, "torchvision_v2": UserTensorDataset}


def user_batches(name: str, index: ImageIndex, point: Point, num_batches: int, device: torch.device) -> Batches:
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


def our_batches(loader: str) -> Callable[..., Batches]:
    def batches(index: ImageIndex, point: Point, num_batches: int, device: torch.device) -> Batches:
        with decoding(point.decode, loader), make_loader(index, point, loader, device) as train_loader:
            yield from train_loader.batches(0, num_batches)

    return batches


def make_loader(index: ImageIndex, point: Point, loader: str, device: torch.device):
    gpu = device.type == "cuda" and loader == "dali"
    view = TrainView(
        img_size=IMG_SIZE,
        scale=SCALE,
        color_jitter=(JITTER,) * 3 if point.views == 2 else None,
        dtype=torch.float16 if gpu else torch.float32,
    )
    batches = BatchPlan(micro_batch_size=point.batch_size)
    return build_loader(index, view, batches, loader=loader, seed=0, device=device, workers=point.num_workers)


class decoding:
    """DALI decodes whole images and crops them then, within a with block, where `decode` is "full"."""

    def __init__(self, decode: str, loader: str):
        self.is_changed = decode == FULL and loader == "dali"

    def __enter__(self) -> None:
        if self.is_changed:
            from tinymim_fast.data import dali_loader as dali

            self.module, self.original = dali, dali._decode_crop
            dali._decode_crop = decode_then_crop

    def __exit__(self, *_) -> None:
        if self.is_changed:
            self.module._decode_crop = self.original


def decode_then_crop(encoded, start, shape, decoder: dict):
    from nvidia.dali import fn

    return fn.slice(fn.decoders.image(encoded, **decoder), start=start, shape=shape, axes=[0, 1])


PROVIDERS = {
    "dali_mixed": our_batches("dali"),
    "dali_cpu": our_batches("dali"),
    "fallback": our_batches("torchvision"),
    **{name: partial(user_batches, name) for name in USER_DATASETS},
}
PEER = "torchvision"


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


def take(provider: str, index: ImageIndex, point: Point, device: torch.device, min_images: int) -> Sample:
    """One repeat. The first round, which starts the workers, is not timed."""
    workers, num_batches = point.num_workers, num_batches_of(point, min_images)
    cpu_before, waited = cpu_s(), 0.0
    batches = PROVIDERS[provider](index, point, num_batches, device)
    for number in range(num_batches):
        asked = time.perf_counter()
        next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        got = time.perf_counter()
        if number >= workers:
            waited += got - asked
        if point.pause_ms:
            time.sleep(point.pause_ms / 1e3)
        if number == workers - 1:
            began = time.perf_counter()
    elapsed = time.perf_counter() - began
    assert next(batches, None) is None
    return Sample(
        step_ms=1e3 * elapsed / (num_batches - workers),
        cpu_ms_per_image=1e3 * (cpu_s() - cpu_before) / (num_batches * point.batch_size),
        wait_share=waited / elapsed,
    )


def measure(index: ImageIndex, point: Point, providers: Sequence[str], args: argparse.Namespace) -> list[Row]:
    pixels = index.sizes.astype(np.int64).prod(axis=1)
    described = {
        "kib_per_image": round(args.kib_per_image, 1),
        "megapixels_per_image": round(float(pixels.mean()) / 1e6, 3),
    }
    columns, samples = {}, {}
    for provider in providers:
        try:
            columns[provider] = gate(provider, index, point, args.device)
        except Exception as error:
            columns[provider] = {"status": harness.NOT_AVAILABLE, "detail": harness.one_line(error)}
        if columns[provider]["status"] == harness.OK:
            samples[provider] = []
    for _ in range(args.num_repeats):
        for provider, taken in samples.items():
            taken.append(take(provider, index, point, args.device, args.min_images))
    for provider, taken in samples.items():
        times = harness.percentiles([sample.step_ms for sample in taken])
        columns[provider] |= {
            **times,
            "num_repeats": len(taken),
            "images_per_s": round(1e3 * point.batch_size / times["step_ms"], 1),
            "cpu_ms_per_image": round(statistics.median(sample.cpu_ms_per_image for sample in taken), 3),
            "wait_share": round(statistics.median(sample.wait_share for sample in taken), 3),
        }
    return [Row(**asdict(point), provider=p, **columns[p], **described) for p in providers]


def draw_photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels and some 110 KB, as ImageNet's are: noise whose power falls with frequency as in photographs."""

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
        except InputError as error:
            raise InputError(f"--data-path: {error}") from error
        if whole.shards:
            raise InputError(f"--data-path {args.data_path}: holds shards, want an image folder; they are made here")
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
    cores = args.workers[-1]
    base = Point(sweep="views", num_workers=cores, batch_size=args.batch_sizes[0])
    points = [base, replace(base, views=1)]
    points += [replace(base, sweep="source", source=source) for source in ("folder", "tar")]
    points += [replace(base, sweep="decode", decode=decode) for decode in (CROP, FULL)]
    points += [replace(base, sweep="pause", pause_ms=pause) for pause in args.pause_ms]
    points += [replace(base, sweep="workers", num_workers=workers) for workers in args.workers]
    points += [replace(base, sweep="batch", batch_size=batch_size) for batch_size in args.batch_sizes]
    return [point for point in points if point.sweep in args.sweep]


def run(args: argparse.Namespace, results: harness.ResultFile, indexes: dict[str, ImageIndex]) -> list[Row]:
    """Measure point by point while the budget lasts; each point's rows are printed and written at once."""
    start_s, s_per_image = time.monotonic(), 0.0
    rows: list[Row] = []
    left_out: list[str] = []
    measured: dict[Point, list[Row]] = {}  # sweeps share points
    for point in args.points:
        key = replace(point, sweep="")
        num_images = num_batches_of(point, args.min_images) * point.batch_size
        began = time.monotonic()
        if key not in measured:
            if args.time_budget is not None and began - start_s + s_per_image * num_images > args.time_budget:
                left_out.append(str(point))
                continue
            providers = [name for name in args.providers if runs(name, point)]
            measured[key] = measure(indexes[point.source], point, providers, args)
            s_per_image = max(s_per_image, (time.monotonic() - began) / num_images)  # over all providers and repeats
            print_table(measured[key])
            sys.stdout.flush()
        for row in measured[key]:
            rows.append(replace(row, sweep=point.sweep))
            results.add(rows[-1])
    if left_out:
        print(f"\n--time-budget {args.time_budget:g}: left out " + "; ".join(left_out))
    return rows


def runs(provider: str, point: Point) -> bool:
    """Whether the point says anything about a provider."""
    if provider in USER_DATASETS:
        return point.source == "folder" and point.decode == CROP
    return point.decode == CROP or provider.startswith("dali")


def print_table(rows: Sequence[Row]) -> None:
    print(f"\n{rows[0]}")
    titles = (
        "images/s",
        "batch ms",
        "20 %",
        "80 %",
        "CPU ms/image",
        "waiting",
        "mean diff",
        "p99 diff",
        "x torchvision",
    )
    print(f"  {'provider':<14}" + "".join(f"{title:>14}" for title in titles))
    peer = next((row.images_per_s for row in rows if row.provider == PEER), None)
    for row in rows:
        if row.status != harness.OK:
            print(f"  {row.provider:<14}{row.status}" + (f" ({row.detail})" if row.detail else ""))
            continue
        difference = ("", "") if row.mean_difference is None else (f"{row.mean_difference}", f"{row.p99_difference}")
        cells = [
            f"{row.images_per_s:,.0f}",
            *(f"{ms:,.0f}" for ms in (row.step_ms, row.step_ms_p20, row.step_ms_p80)),
            f"{row.cpu_ms_per_image:.2f}",
            f"{row.wait_share:.0%}",
            *difference,
            f"{row.images_per_s / peer:.2f}" if peer else "",
        ]
        print(f"  {row.provider:<14}" + "".join(f"{cell:>14}" for cell in cells))


COLORS = {
    "dali_mixed": "#009E73",
    "dali_cpu": "#0072B2",
    "fallback": "#7F7F7F",
    "torchvision": "#222222",
    "torchvision_v2": "#D55E00",
}
X_AXES = {
    "views": ("views", "views"),
    "source": ("source", "files"),
    "decode": ("decode", "decoded part"),
    "workers": ("num_workers", "workers"),
    "batch": ("batch_size", "images in a batch"),
    "pause": ("pause_ms", "step of so many ms"),
}


def draw(rows: Sequence[dict], path: Path) -> None:
    """Bars of images a second by sweep, lines from the 20th to the 80th percentile; share of waiting for "pause"."""
    sweeps = [sweep for sweep in X_AXES if any(row["sweep"] == sweep for row in rows)]
    figure = Figure(
        figsize=(4.6 * min(3, len(sweeps)), 3.4 * math.ceil(len(sweeps) / 3)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for i, sweep in enumerate(sweeps):
        axes = figure.add_subplot(math.ceil(len(sweeps) / 3), min(3, len(sweeps)), i + 1)
        column, label = X_AXES[sweep]
        of_sweep = [row for row in rows if row["sweep"] == sweep and row["status"] == harness.OK]
        groups = list(dict.fromkeys(row[column] for row in of_sweep))
        providers = [name for name in COLORS if any(row["provider"] == name for row in of_sweep)]
        for j, provider in enumerate(providers):
            for row in (row for row in of_sweep if row["provider"] == provider):
                x = groups.index(row[column]) + (j - (len(providers) - 1) / 2) * 0.8 / len(providers)
                width, color = 0.74 / len(providers), COLORS[provider]
                if sweep == "pause":
                    axes.bar(x, 100 * row["wait_share"], width, color=color)
                    continue
                axes.bar(x, row["images_per_s"], width, color=color, label=provider)
                ends = [1e3 * row["batch_size"] / row[end] for end in ("step_ms_p80", "step_ms_p20")]
                axes.vlines(x, *ends, color="#222222", linewidth=1)
        axes.set_xticks(
            range(len(groups)), [f"{group:g}" if isinstance(group, float) else str(group) for group in groups]
        )
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set(xlabel=label, ylabel="waiting (%)" if sweep == "pause" else "images/s")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    first = rows[0]
    figure.supxlabel(
        f"{first['device']}, {os.cpu_count()} cores, {first['kib_per_image']:.0f} KiB an image, commit {first['commit']}, "
        f"{first['date']}. Medians.",
        fontsize=7.5,
        color="#666666",
    )
    figure.savefig(path)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data-path", help="image folder; default: drawn JPEGs of ImageNet's size")
    parser.add_argument(
        "--num-images", type=positive, default=1024, help="drawn, or taken from --data-path (default: 1024)"
    )
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--sweep", nargs="+", choices=list(X_AXES), default=list(X_AXES), help="default: all")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that the device can run")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[64, 256, 1024], help="the first for all sweeps"
    )
    parser.add_argument(
        "--workers", nargs="+", type=positive, help="default: 1, 2, 4 to all cores; the last for all sweeps"
    )
    parser.add_argument(
        "--pause-ms", nargs="+", type=float, default=[100.0, 250.0], help="length of a training step, for the waiting"
    )
    parser.add_argument("--num-repeats", type=positive, default=5)
    parser.add_argument("--min-images", type=positive, help="in a repeat (default: 512; 8192 on a GPU)")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no point that may not end in time")
    parser.add_argument("--output", type=Path, metavar="CSV", help="written point by point; a picture beside it")
    args = parser.parse_args(arguments)
    args.device = args.device or harness.default_device()
    if args.device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: got cuda, but PyTorch sees no GPU; want --device cpu")
        args.device = torch.device("cuda", args.device.index or 0)
    cores = len(os.sched_getaffinity(0))
    args.workers = args.workers or sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    args.min_images = args.min_images or (8192 if args.device.type == "cuda" else 512)
    on_cpu_only, on_gpu_only = ("dali_cpu",), ("dali_mixed",)
    cannot = on_cpu_only if args.device.type == "cuda" else on_gpu_only
    args.providers = args.providers or [name for name in PROVIDERS if name not in cannot]
    wrong = [name for name in args.providers if name in cannot]
    if wrong:
        parser.error(f"--providers: got {wrong[0]}, which can't run on --device {args.device}")
    args.points = plan(args)
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(1)  # what is measured are the loaders' own threads and processes
    results = harness.ResultFile(args.output, args.device)
    print(", ".join(f"{name} {value}" for name, value in results.environment.items() if value != ""))
    with tempfile.TemporaryDirectory(prefix="data_loading_") as scratch:
        try:
            indexes = prepare(args, Path(scratch))
        except InputError as error:
            print(f"data_loading.py: {error}", file=sys.stderr)
            return 2
        too_large = [point for point in args.points if point.batch_size > len(indexes["folder"])]
        for point in too_large:
            print(f"left out, for there are {len(indexes['folder'])} images: {point}")
        args.points = [point for point in args.points if point not in too_large]
        print(
            f"{len(indexes['folder'])} JPEGs, {args.kib_per_image:.0f} KiB each; to {args.device}, {args.num_repeats} repeats of "
            f"{args.min_images} images or more, medians"
        )
        try:
            rows = run(args, results, indexes)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {args.output or 'the output above'} holds what was measured")
            return 130
    if args.output and rows:
        picture = args.output.with_suffix(".png")
        draw(results.rows, picture)
        print(f"\n{args.output}: {len(rows)} rows; {picture}")
    broken = [row for row in rows if row.provider not in USER_DATASETS and row.status != harness.OK]
    for row in broken:
        print(f"{row.provider}: {row.status} at {row}: {row.detail}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
