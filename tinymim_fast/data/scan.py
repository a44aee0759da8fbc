"""List the images of a data set once, find the damaged and the odd ones, and write the index that training reads.

python -m tinymim_fast.data.scan DIR     (DIR/train/<class>/*.jpg, DIR/<class>/*.jpg or DIR/train-*.tar; also val)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tinymim_fast.data.errors import DataError
from tinymim_fast.data.headers import Verdict
from tinymim_fast.data.index import INDEX_FILE, ImageIndex, save_indexes, scan_images, splits_of
from tinymim_fast.errors import EXIT_INPUT

_LIMIT = 20  # names under a verdict
_EPILOG = """\
Every header is read, and the last bytes of JPEG and PNG files; where the end-of-image marker is missing there, the file
is decoded to see whether it is truncated. Damage inside a file, and truncation of other formats, is found in training.

left out:     unreadable, empty, non-image, truncated, huge (more pixels than PIL decodes), unsupported (such as GIF)
trained on:   cmyk, greyscale, sixteen-bit, misnamed (such as a PNG called .JPEG)

Training takes DIR/index.npz by itself (--data-path DIR), and an index written elsewhere with --data-path FILE.npz. Scan
again when files were added or changed.
"""


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
            f"got --output {output}, which can't be written; choose another file, and train with --data-path on it"
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
        raise DataError(f"got --output {output}, which can't be written: {error}") from error
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
        scan(args.dir, args.output or args.dir / INDEX_FILE, workers=args.workers, show_all=args.all)
    except DataError as error:
        print(f"scan: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
