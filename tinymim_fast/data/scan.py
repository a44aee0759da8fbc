"""Find the images of a data set, the damaged and the odd ones among them, and write the index that training reads.

python -m tinymim_fast.data.scan DIR     (DIR/train/<class>/*.jpg, DIR/<class>/*.jpg or DIR/train-*.tar; also val)
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinymim_fast.data.decode import MAX_IMAGE_PIXELS
from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.headers import Header, Verdict, damaged, inspect_path
from tinymim_fast.data.index import INDEX_FILE, ImageIndex, check_stamps, load_index, save_indexes, stamp_of
from tinymim_fast.data.listing import LAYOUTS, Layout, Place, choose, list_classes, places
from tinymim_fast.data.parallel import Progress, in_parallel
from tinymim_fast.data.shards import Sample, Shard, read_shard
from tinymim_fast.errors import EXIT_INPUT, flags, printable

log = logging.getLogger(__name__)

_FILES_PER_TASK = 256  # a task for each file is slow
_PIL_PIXELS = 178_956_970  # PIL decodes no more
_LIMIT = 20  # names under a verdict
_EPILOG = """\
Every header is read, and the last bytes of JPEG and PNG files; where the end-of-image marker is missing there, the file
is decoded to see whether it is truncated. Damage inside a file, and truncation of other formats, is found in training.

left out:     unreadable, empty, non-image, truncated, huge (--max-image-pixels), unsupported (such as GIF),
              unlabelled (in shards where others have labels)
replaced:     no-range (integers of 32 bits, floating point beyond 0 to 255: no file tells what is white)
trained on:   cmyk, greyscale, sixteen-bit, misnamed (such as a PNG called .JPEG)

Training takes DIR/index.npz by itself (--data-path DIR), and an index written elsewhere with --data-path FILE.npz. Scan
again when files were added or changed.
"""


def find_images(
    path: str | Path,
    *,
    split: str = "train",
    layout: Layout = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 8,
) -> ImageIndex:
    """The images of one split: from an index where there is one, else by a scan.

    Args:
        path: a folder (see `scan_images`) that may hold an index.npz, itself or in its subfolder `split`, or an index
            written elsewhere.
        split: "train", "val", or a folder's name.
        layout: how to read a folder without an index; see `listing.places`.
        max_image_pixels: larger images are damaged ones.
        workers: processes for a scan.

    Raises:
        DataError: no such file, folder or split, a folder that can be read in two ways, or no images in it.
    """
    path = Path(path)
    index = _load_index(path, split)
    if index is None:
        index = scan_images(path, split=split, layout=layout, max_image_pixels=max_image_pixels, workers=workers)
    else:
        index = _without_huge(index, max_image_pixels)
    log.info("%s: %s: %d images in %d classes", index.root, split, len(index), len(index.class_names))
    if index.damaged:
        named = _with_reasons(index.damaged)
        log.warning("%s: left out %d of %d images: %s", index.root, len(index.damaged), index.num_listed, named)
    return index


def _load_index(path: Path, split: str) -> ImageIndex | None:
    """What a scan wrote of a split, or None."""
    candidates = [(path, None)] if os.path.isfile(path) or path.suffix == ".npz" else []
    candidates += [(home / INDEX_FILE, home) for home in (path, path / split)]
    for file, home in candidates:
        if home is not None and not os.path.isfile(file):
            continue
        index = load_index(file, None if home == path / split else split, home=home)
        log.info("%s: scanned %s", file, time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime)))
        changed = check_stamps(index, file)
        if changed:
            log.warning(
                "%s: changed since the scan, so new files are missed: %s; run python -m tinymim_fast.data.scan again",
                index.root,
                name_some(changed),
            )
        return index
    return None


def _without_huge(index: ImageIndex, max_pixels: int) -> ImageIndex:
    """Without the images of more pixels, which count as damaged."""
    _check_max(max_pixels)
    is_huge = index.sizes.astype(np.int64).prod(axis=1) > max_pixels
    if not is_huge.any():
        return index
    huge = {
        index.paths[
            i
        ]: f"{Verdict.HUGE.title}: {index.sizes[i, 1]} x {index.sizes[i, 0]}, more than {max_pixels:,} pixels"
        for i in np.flatnonzero(is_huge)
    }
    return replace(index.subset(np.flatnonzero(~is_huge)), damaged={**index.damaged, **huge})


def _check_max(max_pixels: int) -> None:
    if not 0 < max_pixels <= _PIL_PIXELS:
        raise DataError(f"got {max_pixels:,}, want 1 to {_PIL_PIXELS:,}", argument="max_image_pixels")


def scan_images(
    root: str | Path,
    *,
    split: str = "train",
    layout: Layout = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 8,
    progress: Progress | None = None,
) -> ImageIndex:
    """List the images of one split, with their labels and sizes. Only headers and ends are read.

    A folder is laid out as `root/<class>/**/*.jpg`. Classes and labels are torchvision's: sorted class folders,
    hidden ones left out. A folder without class folders that hold images may hold images directly; they all get the
    label 0. Shards are `root/*.tar` in webdataset's layout, with labels as `<key>.cls` or "label" in `<key>.json`.

    Args:
        root: the split's folder, or the folder that contains it or its shards.
        split: see `listing.choose`.
        layout: see `listing.places`.
        max_image_pixels: larger images are damaged ones.
        workers: processes.
        progress: wraps the parts of the work, as tqdm does.

    Returns:
        The index. Files that can't be decoded are left out and listed in `damaged`.

    Raises:
        DataError: no such folder or split, a folder that can be read in two ways, no readable image, or a damaged
            shard.
    """
    return scan_place(
        choose(Path(root), split, layout), max_image_pixels=max_image_pixels, workers=workers, progress=progress
    )


def scan_place(
    place: Place, *, max_image_pixels: int = MAX_IMAGE_PIXELS, workers: int = 8, progress: Progress | None = None
) -> ImageIndex:
    """`scan_images` of a split whose place is known."""
    _check_max(max_image_pixels)
    scan_one = _scan_shards if place.shards else _scan_folder
    index = scan_one(place, max_image_pixels, workers, progress)
    if not index.paths:
        raise DataError(f"got {place.folder}, where no image is readable: {_with_reasons(index.damaged)}")
    return index


def _with_reasons(damaged: dict[str, str]) -> str:
    return name_some(f"{name} ({reason})" for name, reason in damaged.items())


def _scan_folder(place: Place, max_pixels: int, workers: int, progress: Progress | None) -> ImageIndex:
    root = place.folder
    class_names, paths, labels = list_classes(root)
    parts = [
        [os.path.join(root, path) for path in paths[i : i + _FILES_PER_TASK]]
        for i in range(0, len(paths), _FILES_PER_TASK)
    ]
    inspect = partial(_inspect_all, max_pixels=max_pixels)
    headers = [header for part in in_parallel(inspect, parts, workers, progress) for header in part]
    folders = class_names if os.path.dirname(paths[0]) else ["."]
    return _build(
        root,
        class_names,
        paths,
        np.array(labels, dtype=np.int64),
        headers,
        stamps={name: stamp_of(root / name) for name in folders},
    )


def _inspect_all(paths: list[str], max_pixels: int) -> list[Header]:
    return [inspect_path(path, max_pixels) for path in paths]


def _scan_shards(place: Place, max_pixels: int, workers: int, progress: Progress | None) -> ImageIndex:
    root, files = place.folder, place.shards
    read = partial(read_shard, max_pixels=max_pixels)
    shards: list[Shard] = list(in_parallel(read, [str(file) for file in files], workers, progress))
    left_out = sum((shard.left_out for shard in shards), Counter())
    if left_out:
        log.warning(
            "%s: left out of its shards: %s", root, ", ".join(f"{n} x {what}" for what, n in left_out.most_common())
        )
    found = [(number, sample) for number, shard in enumerate(shards) for sample in shard.samples]
    if not found:
        raise DataError(f"got {root}, whose shards have no images; want <key>.jpg and <key>.cls in them")
    class_names, labels, headers = _labels(root, [sample for _, sample in found])
    twice = {name for name, n in Counter(sample.name for _, sample in found).items() if n > 1}
    names = [f"{files[number].name}/{s.name}" if s.name in twice else s.name for number, s in found]
    order = sorted(range(len(found)), key=lambda i: (labels[i], names[i]))
    return _build(
        root,
        class_names,
        [names[i] for i in order],
        np.array(labels, dtype=np.int64)[order],
        [headers[i] for i in order],
        stamps={file.name: stamp_of(file) for file in files},
        shards=tuple(file.name for file in files),
        spans=np.array([(number, sample.offset) for number, sample in found], dtype=np.int64)[order],
    )


def _labels(root: Path, samples: list[Sample]) -> tuple[tuple[str, ...], list[int], list[Header]]:
    """Class names, labels, and headers, in which a picture without a label is damaged where others have one."""
    given = {sample.label for sample in samples} - {None}
    if not given:
        return (root.resolve().name,), [0] * len(samples), [sample.header for sample in samples]
    if all(isinstance(label, int) for label in given):
        class_names = tuple(str(label) for label in range(max(given) + 1))
        labels = [sample.label or 0 for sample in samples]
    else:
        class_names = tuple(sorted(str(label) for label in given))
        position = {name: label for label, name in enumerate(class_names)}
        labels = [position.get(str(sample.label), 0) for sample in samples]
    headers = [
        sample.header if sample.label is not None or sample.header.reason else damaged(Verdict.UNLABELLED)
        for sample in samples
    ]
    return class_names, labels, headers


def _build(root, class_names, names, labels, headers: list[Header], *, spans=None, **fields) -> ImageIndex:
    verdicts = np.array([header.verdict for header in headers], dtype=np.int16)
    is_damaged = (verdicts & Verdict.DAMAGED) != 0
    whole = ImageIndex(
        root=root,
        paths=names,
        labels=labels,
        class_names=tuple(class_names),
        sizes=np.array([header[:2] for header in headers], dtype=np.int32).reshape(-1, 2),
        damaged={names[i]: headers[i].reason for i in np.flatnonzero(is_damaged)},
        num_bytes=np.array([header.num_bytes for header in headers], dtype=np.int64),
        verdicts=verdicts,
        spans=spans,
        **fields,
    )
    return whole.subset(np.flatnonzero(~is_damaged))


def names_by_verdict(index: ImageIndex) -> dict[str, list[str]]:
    """Image names under each `Verdict` that some have; those left out with the reason, and first."""
    found: dict[str, list[str]] = {}
    for name, reason in index.damaged.items():
        title, _, detail = reason.partition(": ")
        found.setdefault(title, []).append(f"{name}: {detail}" if detail else name)
    for verdict in Verdict:
        odd = [index.paths[i] for i in (index.verdicts & verdict).nonzero()[0]]
        if odd:
            found[verdict.title] = odd
    return found


def scan(
    root: Path,
    output: Path,
    *,
    layout: Layout = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    workers: int,
    show_all: bool,
) -> None:
    """Scan each split of `root`, print what was found, and write the index.

    Raises:
        DataError: see `scan_images`; or `output` can't be written.
    """
    if root.is_dir() and not os.access(output if output.exists() else output.parent, os.W_OK):
        raise DataError(
            f"got {output}, which can't be written; choose another file, and train with --data-path on it",
            argument="output",
        )
    splits = {}
    for place in places(root, layout):
        if place.split == "test":  # for no program here
            continue
        if place.split in splits:
            raise DataError(f"got {root}, which holds {place.split} twice; rename one folder, or scan each alone")
        began = time.perf_counter()
        index = scan_place(place, max_image_pixels=max_image_pixels, workers=workers, progress=_bar)
        splits[place.split] = index
        per_100k = (time.perf_counter() - began) * 1e5 / index.num_listed
        print(
            f"{place.split or printable(str(root))}: {index.num_listed:,} images in {len(index.class_names):,} "
            f"classes, {len(index.damaged):,} left out; {per_100k:.1f} s per 100,000 files"
        )
        for title, names in names_by_verdict(index).items():
            print(f"  {title}: {len(names):,}")
            shown = names if show_all else names[:_LIMIT]
            print("".join(f"    {printable(name)}\n" for name in shown), end="")
            if len(shown) < len(names):
                print(f"    ... {len(names) - len(shown):,} more (--all)")
    try:
        save_indexes(output, splits, home=root)
    except OSError as error:
        raise DataError(f"got {output}, which can't be written: {error}", argument="output") from error
    print(f"written: {printable(str(output))}")


def _bar(parts, total):
    return tqdm(parts, total=total, unit="part", disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tinymim_fast.data.scan",
        description=__doc__.split("\n")[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", type=Path, help="folder of images or shards, or of train/ and val/")
    parser.add_argument("--output", type=Path, help=f"file for the index (default: DIR/{INDEX_FILE})")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="what DIR holds: folders of splits, of classes, or shards (default: what its listing says)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        help=f"leave out larger images (default: {MAX_IMAGE_PIXELS:,})",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--all", action="store_true", help=f"print all names, not the first {_LIMIT} of a kind")
    args = parser.parse_args(argv)
    try:
        with flags(
            **{name: f"--{name.replace('_', '-')}" for name in ("output", "layout", "max_image_pixels", "workers")}
        ):
            scan(
                args.dir,
                args.output or args.dir / INDEX_FILE,
                layout=args.layout,
                max_image_pixels=args.max_image_pixels,
                workers=args.workers,
                show_all=args.all,
            )
    except DataError as error:
        print(f"scan: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
