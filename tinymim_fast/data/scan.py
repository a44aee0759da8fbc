"""List the images of a data set once, find the damaged and the odd ones, and write the index that training reads.

python -m tinymim_fast.data.scan DIR     (DIR/train/<class>/*.jpg, DIR/<class>/*.jpg or DIR/train-*.tar; also val)
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.headers import IMG_EXTENSIONS, Header, Verdict, inspect_path
from tinymim_fast.data.index import INDEX_FILE, ImageIndex, check_stamps, load_index, save_indexes, stamp_of
from tinymim_fast.data.parallel import Progress, in_parallel
from tinymim_fast.data.shards import Sample, find_shards, read_shard
from tinymim_fast.errors import EXIT_INPUT, flags

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
_LAYOUT = "want DIR/<class>/*.jpg, DIR/train/<class>/*.jpg, images directly in DIR, or shards DIR/*.tar"
_FILES_PER_TASK = 256  # a task for each file is slow
_LIMIT = 20  # names under a verdict
_EPILOG = """\
Every header is read, and the last bytes of JPEG and PNG files; where the end-of-image marker is missing there, the file
is decoded to see whether it is truncated. Damage inside a file, and truncation of other formats, is found in training.

left out:     unreadable, empty, non-image, truncated, huge (more pixels than PIL decodes), unsupported (such as GIF)
trained on:   cmyk, greyscale, sixteen-bit, misnamed (such as a PNG called .JPEG)

Training takes DIR/index.npz by itself (--data-path DIR), and an index written elsewhere with --data-path FILE.npz. Scan
again when files were added or changed.
"""


def find_images(path: str | Path, *, split: str = "train", workers: int = 8) -> ImageIndex:
    """The images of one split: from an index where there is one, else by a scan.

    Args:
        path: a folder (see `scan_images`) that may hold an index.npz, itself or in its subfolder `split`, or an
            index written elsewhere.
        split: "train" or "val".
        workers: processes for a scan.

    Raises:
        DataError: no such file or folder, or no images in it.
    """
    path = Path(path)
    candidates = [(path, None)] if path.is_file() or path.suffix == ".npz" else []
    candidates += [(home / INDEX_FILE, home) for home in (path, path / split)]
    for file, home in candidates:
        if home is not None and not file.is_file():
            continue
        index = load_index(file, split, home=home)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
        log.info("%s: %d images, scanned %s", file, len(index), when)
        changed = check_stamps(index, file)
        if changed:
            log.warning(
                "%s: changed since the scan, so new files are missed: %s; run python -m tinymim_fast.data.scan again",
                index.root,
                name_some(changed),
            )
        break
    else:
        index = scan_images(path, split=split, workers=workers)
    if index.damaged:
        named = _with_reasons(index.damaged)
        log.warning("%s: left out %d of %d images: %s", index.root, len(index.damaged), index.num_listed, named)
    return index


def scan_images(
    root: str | Path, *, split: str | None = None, workers: int = 8, progress: Progress | None = None
) -> ImageIndex:
    """List the images of a folder or of tar shards, with their labels and sizes. Only headers and ends are read.

    A folder is laid out as `root/<class>/**/*.jpg`. Classes and labels are torchvision's: sorted class folders,
    hidden ones left out. A folder without class folders that hold images may hold images directly; they all get the
    label 0. Shards are `root/*.tar` in webdataset's layout, with labels as `<key>.cls` or "label" in `<key>.json`.

    Args:
        root: the split's folder, or the folder that contains it or its shards.
        split: name of a subfolder ("train") to use instead of `root` where it exists, or of shards (train-*.tar).
        workers: processes.
        progress: wraps the parts of the work, as tqdm does.

    Returns:
        The index. Files that can't be decoded are left out and listed in `damaged`.

    Raises:
        DataError: no such folder, nothing in it, no images in it, no readable image in it, or a damaged shard.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"got {root}, which is no folder; {_LAYOUT}")
    if split is not None and (root / split).is_dir():
        root = root / split
    shards = find_shards(root)
    if shards:
        names = shards.get(split or "", shards.get("", []))
        if not names:
            raise DataError(f"got {root} with shards of {', '.join(shards)}, want some of {split}: {split or ''}-*.tar")
        index = _scan_shards(root, names, workers, progress)
    else:
        index = _scan_folder(root, workers, progress)
    if not index.paths:
        raise DataError(f"got {root}, where no image is readable: {_with_reasons(index.damaged)}")
    return index


def _with_reasons(damaged: dict[str, str]) -> str:
    return name_some(f"{name} ({reason})" for name, reason in damaged.items())


def splits_of(root: Path) -> list[str]:
    """The splits that a data set's folder holds, as subfolders or as names of shards; [""] where it has none."""
    subfolders = [split for split in SPLITS if (root / split).is_dir()]
    return subfolders or sorted(find_shards(root)) or [""]


def _scan_folder(root: Path, workers: int, progress: Progress | None) -> ImageIndex:
    class_names, paths, labels = _list_images(root)
    if not paths:
        state = "has no images" if any(root.iterdir()) else "is empty"
        raise DataError(f"got {root}, which {state}; {_LAYOUT} (any of {' '.join(IMG_EXTENSIONS)})")
    parts = [
        [os.path.join(root, path) for path in paths[i : i + _FILES_PER_TASK]]
        for i in range(0, len(paths), _FILES_PER_TASK)
    ]
    headers = [header for part in in_parallel(_inspect_all, parts, workers, progress) for header in part]
    folders = class_names if os.path.dirname(paths[0]) else ["."]
    return _build(
        root,
        class_names,
        paths,
        np.array(labels, dtype=np.int64),
        headers,
        stamps={name: stamp_of(root / name) for name in folders},
    )


def _scan_shards(root: Path, files: list[Path], workers: int, progress: Progress | None) -> ImageIndex:
    found: list[tuple[int, Sample]] = []
    for shard, samples in enumerate(in_parallel(read_shard, [str(file) for file in files], workers, progress)):
        found += [(shard, sample) for sample in samples]
    if not found:
        raise DataError(f"got {root}, whose shards have no images; want <key>.jpg and <key>.cls in them")
    found.sort(key=lambda pair: (pair[1].label, pair[1].name, pair[0]))
    labels = np.array([sample.label for _, sample in found], dtype=np.int64)
    if labels[0] < 0:
        if labels[-1] >= 0:
            raise DataError(f"got shard {files[found[0][0]]}, where {found[0][1].name} has no label though others have")
        labels[:] = 0
        class_names = (root.resolve().name,)
    else:
        class_names = tuple(str(label) for label in range(labels.max() + 1))
    headers = [sample.header for _, sample in found]
    return _build(
        root,
        class_names,
        [sample.name for _, sample in found],
        labels,
        headers,
        stamps={file.name: stamp_of(file) for file in files},
        shards=tuple(file.name for file in files),
        spans=np.array([(shard, s.offset) for shard, s in found], dtype=np.int64),
    )


def _build(root, class_names, names, labels, headers: list[Header], *, spans=None, **fields) -> ImageIndex:
    verdicts = np.array([header.verdict for header in headers], dtype=np.int16)
    is_damaged = (verdicts & Verdict.DAMAGED) != 0
    kept = np.flatnonzero(~is_damaged)
    return ImageIndex(
        root=root,
        paths=[names[i] for i in kept],
        labels=labels[kept],
        class_names=tuple(class_names),
        sizes=np.array([headers[i][:2] for i in kept], dtype=np.int32).reshape(-1, 2),
        damaged={names[i]: headers[i].reason for i in np.flatnonzero(is_damaged)},
        num_bytes=np.array([headers[i].num_bytes for i in kept], dtype=np.int64),
        verdicts=verdicts[kept],
        spans=None if spans is None else spans[kept],
        **fields,
    )


def _inspect_all(paths: list[str]) -> list[Header]:
    return [inspect_path(path) for path in paths]


def _list_images(root: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, relative image paths and labels."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    per_class = [sorted(_walk(root, name)) for name in folders]
    if any(per_class):
        empty = [name for name, paths in zip(folders, per_class) if not paths]
        if empty:  # they keep their label, so that two splits of one data set agree
            log.warning("%s: classes without images: %s", root, name_some(empty))
        paths = [path for paths in per_class for path in paths]
        labels = [label for label, paths in enumerate(per_class) for _ in paths]
        return tuple(folders), paths, labels
    paths = sorted(entry.name for entry in os.scandir(root) if _is_image(entry.name) and entry.is_file())
    return (root.resolve().name,), paths, [0] * len(paths)


def _walk(root: Path, folder: str):
    for base, _, files in os.walk(root / folder, followlinks=True):
        relative = Path(base).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in files if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


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


def scan(root: Path, output: Path, *, workers: int, show_all: bool) -> None:
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
    for split in splits_of(root):
        began = time.perf_counter()
        index = splits[split] = scan_images(root, split=split or None, workers=workers, progress=_bar)
        per_100k = (time.perf_counter() - began) * 1e5 / index.num_listed
        print(
            f"{split or root}: {index.num_listed:,} images in {len(index.class_names):,} classes, "
            f"{len(index.damaged):,} left out; {per_100k:.1f} s per 100,000 files"
        )
        for title, names in names_by_verdict(index).items():
            print(f"  {title}: {len(names):,}")
            shown = names if show_all else names[:_LIMIT]
            print("".join(f"    {name}\n" for name in shown), end="")
            if len(shown) < len(names):
                print(f"    ... {len(names) - len(shown):,} more (--all)")
    try:
        save_indexes(output, splits, home=root)
    except OSError as error:
        raise DataError(f"got {output}, which can't be written: {error}", argument="output") from error
    print(f"written: {output}")


def _bar(parts, total):
    return tqdm(parts, total=total, unit="part", disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinymim_fast.data.scan",
        description=__doc__.split("\n")[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", type=Path, help="folder of images or shards, or of train/ and val/")
    parser.add_argument("--output", type=Path, help=f"file for the index (default: DIR/{INDEX_FILE})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--all", action="store_true", help=f"print all names, not the first {_LIMIT} of a kind")
    args = parser.parse_args(argv)
    try:
        with flags(output="--output"):
            scan(args.dir, args.output or args.dir / INDEX_FILE, workers=args.workers, show_all=args.all)
    except DataError as error:
        print(f"scan: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
