"""Pack an image folder into tar shards in webdataset's layout, for random access here and streaming anywhere.

python -m tinymim_fast.data.pack SRC DST     (SRC/train/<class>/*.jpg or SRC/<class>/*.jpg; also val)
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinymim_fast.data.draws import epoch_order
from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.index import INDEX_FILE, ImageIndex, save_indexes
from tinymim_fast.data.listing import LAYOUTS, Layout, places
from tinymim_fast.data.parallel import in_parallel
from tinymim_fast.data.scan import find_images, scan_images
from tinymim_fast.errors import EXIT_INPUT, flags
from tinymim_fast.files import PREFIX, remove_unfinished, whole_file, write_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_JPEG_SIDE = 65_500  # the longest side that libjpeg writes
_OPTIONS = ("short_side", "quality", "max_count", "shard_size", "workers")
_EPILOG = """\
Shards are DST/train-000000.tar and so on, with <key>.jpg and <key>.cls for each image; keys are the paths in SRC, "."
as %2E. Their images are shuffled, once, so that they can be streamed too. DST/manifest.json holds class names, and
count and SHA-256 of each shard; DST/index.npz where each image lies. --data-path DST trains in the order of SRC, and
with its crops where nothing was resized.

A pack that was cut off goes on with the same command. Damaged images are left out and named. With --short-side, larger
images are resized as for evaluation (bicubic, antialiased) and stored as RGB JPEG without EXIF; others are copied byte
for byte.
"""


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to write: its name, its images in its order, and their names in it."""

    name: str
    images: ImageIndex
    names: list[str]
    is_labelled: bool


def pack(
    src: Path,
    dst: Path,
    *,
    short_side: int | None = None,
    quality: int = 95,
    max_count: int = 10_000,
    shard_size: int = 1000,
    layout: Layout = "auto",
    workers: int = 8,
) -> None:
    """Write the shards, manifest and index of a data set; shards that are complete already are kept.

    Args:
        src: image folder, or one of train/ and val/.
        dst: folder to fill.
        short_side: pixels; larger images are resized to it. None copies all.
        quality: of resized JPEGs.
        max_count: images in a shard, at most.
        shard_size: MB of source files in a shard, at most, unless one file alone is larger.
        layout: how to read `src`; see `listing.places`.
        workers: processes.

    Raises:
        DataError: no images, a `src` that can be read in two ways, a damaged one that no header shows, an option out
            of range, or a `dst` that holds something else or can't be written.
    """
    for name, value in zip(_OPTIONS, (short_side, quality, max_count, shard_size, workers), strict=True):
        if value is not None and not 0 < value <= (95 if name == "quality" else value):
            raise DataError(f"got {value}, want {'1 to 95' if name == 'quality' else 'more than 0'}", argument=name)
    options = {"short_side": short_side, "quality": quality if short_side else None}
    splits = dict.fromkeys(place.split or "train" for place in places(src, layout) if place.split != "test")
    sources = {split: find_images(src, split=split, layout=layout, workers=workers) for split in splits}
    sources = _with_common_classes(sources)
    manifest = {
        "made_from": {
            **options,
            "max_count": max_count,
            "shard_size": shard_size,
            "images": {split: _fingerprint(index) for split, index in sources.items()},
        },
        "class_names": {split: list(index.class_names) for split, index in sources.items()},
        "left_out": {split: index.damaged for split, index in sources.items()},
        "shards": {},
    }
    names = {split: _member_names(index, short_side) for split, index in sources.items()}
    try:
        done = _begin(dst, manifest)
        for split, index in sources.items():
            jobs = _jobs(split, index, names[split], max_count, 10**6 * shard_size)
            jobs = [job for job in jobs if job.name not in done]
            write = partial(_write_shard, dst=dst, **options)
            for job, entry in zip(jobs, in_parallel(write, jobs, workers, _bar)):
                done[job.name] = entry
                _write_manifest(dst, manifest, done)
        splits = {split: _index_of(dst, split, index, names[split], workers) for split, index in sources.items()}
        save_indexes(dst / INDEX_FILE, splits, home=dst)
    except OSError as error:
        raise DataError(
            f"got {dst}, which can't be written: {error}; the same command goes on with whole shards"
        ) from error


def verify(dst: Path, *, workers: int = 8) -> None:
    """Compare each shard with the manifest.

    Raises:
        DataError: no complete pack, or shards that are missing or changed; names them.
    """
    shards = _read_manifest(dst)["shards"]
    if not (dst / INDEX_FILE).is_file():
        raise DataError(f"got {dst}, which is not packed to the end; start the same pack again")
    found = list(in_parallel(_checksum, [dst / name for name in shards], workers, _bar))
    broken = [name for (name, entry), checksum in zip(shards.items(), found) if checksum != entry["sha256"]]
    if broken:
        raise DataError(
            f"got shards in {dst} that are missing or not what was packed: {', '.join(broken)}; remove them and "
            f"{INDEX_FILE}, and pack again"
        )
    print(f"{len(shards):,} shards, {sum(entry['num_images'] for entry in shards.values()):,} images: all as packed")


def _with_common_classes(sources: dict[str, ImageIndex]) -> dict[str, ImageIndex]:
    """The same labels in every split: positions in the training set's classes, then those of other splits."""
    class_names = list(sources["train"].class_names) if "train" in sources else []
    for split, index in sources.items():
        own = [name for name in index.class_names if name not in class_names] if index.is_labelled else []
        if class_names and own:
            log.warning("%s: classes that train lacks, labelled behind its own: %s", split, name_some(own))
        class_names += own
    position = {name: label for label, name in enumerate(class_names)}
    common = {}
    for split, index in sources.items():
        if index.is_labelled:
            labels = np.array([position[name] for name in index.class_names], dtype=np.int64)[index.labels]
            index = dataclasses.replace(index, labels=labels, class_names=tuple(class_names))
        common[split] = index
    return common


def _jobs(split: str, index: ImageIndex, names: list[str], max_count: int, max_bytes: int) -> list[_Job]:
    order = epoch_order(len(index), seed=0, epoch=0)
    starts, size = [0], 0
    for at, num_bytes in enumerate(index.num_bytes[order].tolist()):
        if at > starts[-1] and (at - starts[-1] == max_count or size + num_bytes > max_bytes):
            starts.append(at)
            size = 0
        size += num_bytes
    parts = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)])]
    return [
        _Job(f"{split}-{number:06d}.tar", _part(index, part), [names[i] for i in part], index.is_labelled)
        for number, part in enumerate(parts)
    ]


def _part(index: ImageIndex, sample_ids: np.ndarray) -> ImageIndex:
    """Some of the images; small, to be sent to another process."""
    return dataclasses.replace(index.subset(sample_ids), class_names=(), damaged={}, stamps={})


def _write_shard(job: _Job, *, dst: Path, short_side: int | None, quality: int | None) -> dict:
    """One shard, whole or not at all; returns its entry in the manifest."""
    index = job.images
    with whole_file(dst / job.name) as temporary:
        with tarfile.open(temporary, "w") as tar:
            for i in range(len(index)):
                large = _is_large(index, i, short_side)
                content = _resized(index, i, short_side, quality) if large else index.encoded(i)
                members = [(job.names[i], content)]
                if job.is_labelled:
                    members.append((f"{os.path.splitext(job.names[i])[0]}.cls", str(index.labels[i]).encode()))
                for name, data in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return {"num_images": len(index), "num_bytes": temporary.stat().st_size, "sha256": _checksum(temporary)}


def _is_large(index: ImageIndex, sample_id: int, short_side: int | None) -> bool:
    """Whether to resize; what would still be too long for a JPEG stays as it is."""
    if short_side is None:
        return False
    height, width = index.sizes[sample_id].tolist()
    return min(height, width) > short_side and short_side * max(height, width) // min(height, width) <= _JPEG_SIDE


def _member_names(index: ImageIndex, short_side: int | None) -> list[str]:
    """Names in the shards.

    A key ends at the first dot of its last part, so dots before the ending are written as %2E; where two images have
    one key, as a.jpg and a.png, it takes up the ending too.
    """
    parts = []
    for sample_id, path in enumerate(index.paths):
        stem, ending = os.path.splitext(path)
        folder, slash, base = stem.rpartition("/")
        key = folder + slash + base.replace("%", "%25").replace(".", "%2E")
        stored = ending
        if _is_large(index, sample_id, short_side) and ending.lower() not in (".jpg", ".jpeg"):
            stored = ".jpg"
        parts.append((key, ending, stored))
    times = Counter(key for key, _, _ in parts)
    return [(key if times[key] == 1 else f"{key}%2E{ending[1:]}") + stored for key, ending, stored in parts]


def _resized(index: ImageIndex, sample_id: int, short_side: int, quality: int) -> bytes:
    image = index.read_image(sample_id)
    short = min(image.size)
    size = [short_side * side // short for side in image.size]  # torchvision's Resize
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _index_of(dst: Path, split: str, source: ImageIndex, names: list[str], workers: int) -> ImageIndex:
    """Where each image of `source` lies in the shards, in the order of `source`."""
    packed = scan_images(dst, split=split, workers=workers)
    position = {name: i for i, name in enumerate(packed.paths)}
    try:
        order = np.array([position[name] for name in names])
    except KeyError as error:
        raise DataError(f"got shards in {dst} without {error}; run --verify") from error
    arrays = ("sizes", "num_bytes", "verdicts", "spans")
    return dataclasses.replace(
        packed,
        paths=source.paths,
        labels=source.labels,
        class_names=source.class_names,
        **{name: getattr(packed, name)[order] for name in arrays},
    )


def _fingerprint(index: ImageIndex) -> str:
    digest = hashlib.sha256("\0".join(index.paths).encode(errors="surrogateescape"))
    for array in (index.labels, index.sizes, index.num_bytes):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    """SHA-256 of a file, "" where there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _begin(dst: Path, manifest: dict) -> dict[str, dict]:
    """Make or check `dst`; returns the entries of the shards that are complete."""
    if not (dst / MANIFEST).is_file():
        if dst.exists() and (not dst.is_dir() or any(not p.name.startswith(PREFIX) for p in dst.iterdir())):
            raise DataError(f"got {dst}, which holds something else; want a new or empty folder for the shards")
        dst.mkdir(parents=True, exist_ok=True)
        _write_manifest(dst, manifest, {})
        return {}
    before = _read_manifest(dst)
    if before["made_from"] != manifest["made_from"]:
        raise DataError(f"got {dst}, which holds shards of other images or options; choose another folder")
    remove_unfinished(dst)
    return {
        name: entry
        for name, entry in before["shards"].items()
        if (dst / name).is_file() and (dst / name).stat().st_size == entry["num_bytes"]
    }


def _read_manifest(dst: Path) -> dict:
    try:
        return json.loads((dst / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"got {dst}, want a folder that python -m tinymim_fast.data.pack made: {error}") from error


def _write_manifest(dst: Path, manifest: dict, shards: dict[str, dict]) -> None:
    write_text(dst / MANIFEST, json.dumps({**manifest, "shards": shards}, indent=1) + "\n")


def _bar(parts, total):
    return tqdm(parts, total=total, unit="shard", disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tinymim_fast.data.pack",
        description=__doc__.split("\n")[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", type=Path, nargs="?", help="image folder, or one of train/ and val/")
    parser.add_argument("dst", type=Path, help="new folder for the shards, or one to go on with")
    parser.add_argument("--short-side", type=int, help="resize larger images to this short side, pixels")
    parser.add_argument("--quality", type=int, default=95, help="of resized JPEGs, 1 to 95 (default: 95)")
    parser.add_argument("--max-count", type=int, default=10_000, help="images in a shard (default: 10000)")
    parser.add_argument("--shard-size", type=int, default=1000, help="MB of images in a shard (default: 1000)")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="what SRC holds, where its listing says two things"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--verify", action="store_true", help="compare each shard with its checksum; needs DST alone")
    args = parser.parse_args(argv)
    try:
        if args.src is not None:
            options = {name: getattr(args, name) for name in (*_OPTIONS, "layout")}
            with flags(**{name: f"--{name.replace('_', '-')}" for name in options}):
                pack(args.src, args.dst, **options)
            print(f"packed: {args.dst}; train with --data-path {args.dst}")
        elif not args.verify:
            raise DataError(f"got {args.dst} alone, want SRC DST, or --verify")
        if args.verify:
            verify(args.dst, workers=args.workers)
    except DataError as error:
        print(f"pack: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
