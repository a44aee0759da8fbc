"""Tar shards in webdataset's layout, `<key>.jpg` and `<key>.cls` side by side, as we and others write them."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from typing import NamedTuple

from tinymim_fast.data.decode import MAX_IMAGE_PIXELS, one_line
from tinymim_fast.data.errors import DataError
from tinymim_fast.data.headers import IMG_EXTENSIONS, Header, inspect

MAX_LABEL = 999_999  # larger ones are ids of something, not classes
_MAX_SIDECAR = 1 << 16  # bytes of a .cls or .json
_BLOCK = 512  # bytes; zeros behind the last member end an archive


class Sample(NamedTuple):
    """One picture of a shard: name, label (a class's number or name, or None), position in bytes, header."""

    name: str
    label: int | str | None
    offset: int
    header: Header


class Shard(NamedTuple):
    """What one shard holds: its pictures in their order, and how many members of each kind were left out."""

    samples: list[Sample]
    left_out: Counter[str]


def read_shard(path: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Shard:
    """The pictures of one shard; only headers and labels are read.

    A sample is what shares a key, the name up to the first dot of its last part. Its picture is the member with the
    shortest ending ("jpg" before "mask.png"), its label the number or the class name in `.cls`, else "label" or "cls"
    in `.json`. Further pictures of a sample, links, sparse members, `._*` files of macOS and sidecars without a label
    are counted.

    Args:
        path: the tar file.
        max_pixels: an image of more is damaged.

    Raises:
        DataError: the shard is damaged or truncated, a name is in it twice, or a label is out of range; names the
            shard.
    """
    images: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    labels: dict[str, dict[str, int | str]] = {}
    names, left_out = set(), Counter()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isreg() or member.issparse() or base.startswith("._"):
                    left_out["._ file" if base.startswith("._") else "link or special member"] += 1
                    continue
                if member.name in names:
                    raise DataError(f"got shard {path}, where {member.name} comes twice; names must differ")
                names.add(member.name)
                key = f"{folder}/{stem}"
                if f".{ending}".lower().endswith(IMG_EXTENSIONS):
                    images.setdefault(key, []).append((ending.lower(), member))
                elif ending in ("cls", "json"):
                    label = _label(tar.extractfile(member).read(_MAX_SIDECAR + 1), ending)
                    if label is None:
                        left_out["sidecar without a label"] += 1
                    else:
                        _check(label, path, member.name)
                        labels.setdefault(key, {})[ending] = label
            if os.path.getsize(path) < tar.offset + _BLOCK:  # tarfile takes a missing end for the end
                raise tarfile.ReadError("the end is missing")
            samples = []
            for key, found in images.items():
                found.sort(
                    key=lambda pair: (pair[0].count("."), IMG_EXTENSIONS.index(f".{pair[0].rpartition('.')[2]}"))
                )
                left_out["further picture of a sample"] += len(found) - 1
                member = found[0][1]
                of_key = labels.get(key, {})
                with tar.extractfile(member) as file:
                    header = inspect(file, member.name, max_pixels)
                samples.append(Sample(member.name, of_key.get("cls", of_key.get("json")), member.offset_data, header))
    except DataError:
        raise
    except Exception as error:  # what tarfile raises on damaged archives is not documented
        raise DataError(
            f"got shard {path}, which is damaged or truncated: {one_line(error)}; copy or pack it again, or remove it"
        ) from error
    samples.sort(key=lambda sample: sample.offset)
    return Shard(samples, +left_out)


def _label(content: bytes, ending: str) -> int | str | None:
    """The label in a sidecar, None for one that is broken, too long, or says something else."""
    if len(content) > _MAX_SIDECAR:
        return None
    try:
        label = content.decode().strip() if ending == "cls" else json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(label, dict):
        label = label.get("label", label.get("cls"))
    if isinstance(label, str):
        label = label.strip()
        digits = label.removeprefix("-")
        return int(label) if digits.isascii() and digits.isdigit() and len(digits) < 20 else label or None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _check(label: int | str, path: str, name: str) -> None:
    if isinstance(label, int) and not 0 <= label <= MAX_LABEL:
        raise DataError(
            f"got shard {path}, where {name} has the label {label}, want a class: 0 to {MAX_LABEL:,}, or a name"
        )
