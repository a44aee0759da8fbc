"""Which files make up a split: what a folder's whole listing says, and a refusal where it says two things."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.headers import IMG_EXTENSIONS
from tinymim_fast.files import PREFIX

log = logging.getLogger(__name__)

Layout = Literal["auto", "splits", "classes", "shards"]
LAYOUTS = ("auto", "splits", "classes", "shards")
_WANT = (
    f"want DIR/<class>/*.jpg, DIR/train/<class>/*.jpg, images directly in DIR (any of {' '.join(IMG_EXTENSIONS)}), or "
    "shards DIR/*.tar"
)
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLIT_WORDS)})([-_ ]?\d+)?", re.IGNORECASE)  # also train2017


@dataclass(frozen=True)
class Place:
    """Where a split lies.

    Args:
        folder: its folder, or that of its shards.
        split: "train", "val", "test", or "" where the data set has no splits.
        shards: the tar files; none for a folder of images.
    """

    folder: Path
    split: str = ""
    shards: tuple[Path, ...] = ()


@dataclass
class _Listing:
    """What lies directly in a folder, and whether images lie below."""

    folder: Path
    images: list[str]
    tars: list[Path]
    folders: list[str]  # that hold images, at any depth
    tar_folders: list[str]  # that hold shards, and no images


def places(root: Path, layout: Layout = "auto") -> list[Place]:
    """All splits of a data set, decided from its whole listing.

    Args:
        root: folder of the data set.
        layout: "splits": the subfolders of `root` are splits. "classes": they are classes of one split. "shards": the
            tar files count, and nothing else. "auto": what the listing says.

    Raises:
        DataError: no such folder, nothing in it, or it can be read in two ways; names both and `layout`.
    """
    if layout not in LAYOUTS:
        raise DataError(f"got {layout}, want one of {', '.join(LAYOUTS)}", argument="layout")
    _check_folder(root)
    found = _list(root)
    named = [name for name in [*found.folders, *found.tar_folders] if split_of(name)]
    others = [name for name in found.folders if not split_of(name)]
    if layout == "auto":
        layout = _decide(found, named, others)
    if layout == "shards" and found.tars:
        return _shards_by_split(root, found.tars)
    if layout == "classes":
        _say_left_out(found, tars=True)
        return [Place(root)]
    if not named:
        raise DataError(
            f"got {root}, which has no folder train/ or val/ with images or shards in it", argument="layout"
        )
    _say_left_out(found, tars=True, images=True)
    return [_inside(root / name, split_of(name), layout) for name in named]


def split_of(name: str) -> str:
    """The split that a folder's name tells: "train", "val", "test", or ""."""
    match = _SPLIT_NAME.fullmatch(name)
    return _SPLIT_WORDS[match[1].lower()] if match else ""


def choose(root: Path, split: str, layout: Layout = "auto") -> Place:
    """The place of one split; see `places`.

    Args:
        root: folder of the data set, or of the split itself.
        split: "train" also takes a data set without splits; any other must be there, by one of its names or as a
            folder called so.
        layout: see `places`.

    Raises:
        DataError: see `places`; the split is missing, or two folders may be it.
    """
    _check_folder(root)
    if layout in ("auto", "splits") and not split_of(split) and (root / split).is_dir():
        return _inside(root / split, split, layout)
    found = places(root, layout)
    of_split = [place for place in found if place.split == (split_of(split) or split)]
    if len(of_split) > 1:
        of_split = [place for place in of_split if place.folder.name == split] or of_split
    if len(of_split) > 1:
        names = ", ".join(place.folder.name for place in of_split)
        raise DataError(f"got {root}, where {names} may all be {split}; say which by its name", argument="split")
    if of_split:
        return of_split[0]
    if split == "train" and found[0].split == "":
        return found[0]
    have = ", ".join(place.split for place in found if place.split) or "no splits"
    raise DataError(f"got {root}, which holds {have}; want {split}: a folder {split}/ or shards {split}-*.tar in it")


def _check_folder(root: Path) -> None:
    try:
        is_folder, why = root.is_dir(), f"is no folder; {_WANT}"
    except OSError as error:
        is_folder, why = False, f"can't be read: {error.strerror}"
    if not is_folder:
        raise DataError(f"got {root}, which {why}")


def _decide(found: _Listing, named: list[str], others: list[str]) -> Layout:
    images = [*found.folders, *found.images]
    if found.tars and images:
        raise DataError(
            f"got {found.folder}, which can be read as shards ({name_some((p.name for p in found.tars), 3)}) or as "
            f"images ({name_some(images, 3)}); say shards, or {'splits' if named else 'classes'}, or move one of them "
            "away",
            argument="layout",
        )
    if named and others:
        raise DataError(
            f"got {found.folder}, which can be read as splits ({', '.join(named)}, leaving out {name_some(others, 3)}) "
            f"or as {len(found.folders)} classes (of which {', '.join(named)}); say splits or classes",
            argument="layout",
        )
    if found.tars:
        return "shards"
    return "splits" if named else "classes"


def _inside(folder: Path, split: str, layout: Layout) -> Place:
    """What a split's own folder holds: there, names of folders are classes."""
    found = _list(folder)
    images = [*found.folders, *found.images]
    if layout == "auto" and found.tars and images:
        _decide(found, [], images)
    if found.tars and (layout == "shards" or not images):
        by_split = {place.split: place for place in _shards_by_split(folder, found.tars)}
        return Place(folder, split, by_split.get(split, by_split.get("", Place(folder))).shards)
    _say_left_out(found, tars=True)
    return Place(folder, split)


def _say_left_out(found: _Listing, tars: bool = False, images: bool = False) -> None:
    if tars and found.tars:
        log.warning("%s: left out %s", found.folder, name_some((path.name for path in found.tars), 3))
    if images and found.images:
        log.warning("%s: left out %d images beside its folders", found.folder, len(found.images))


def _shards_by_split(folder: Path, tars: list[Path]) -> list[Place]:
    splits: dict[str, list[Path]] = {}
    for path in tars:
        words = re.split(r"[-_.]", path.stem)
        split = next((found for word in words if (found := split_of(word))), "")
        splits.setdefault(split, []).append(path)
    unnamed = splits.pop("", []) if len(splits) > 1 else []
    if unnamed:
        log.warning("%s: left out %s", folder, name_some((path.name for path in unnamed), 3))
    return [Place(folder, split, tuple(paths)) for split, paths in sorted(splits.items())]


def _list(folder: Path) -> _Listing:
    found = _Listing(folder, [], [], [], [])
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        if entry.name.startswith((".", PREFIX)):  # hidden, or being written
            continue
        if _is_folder(entry):
            if next(_walk(entry.path, {}), None) is not None:
                found.folders.append(entry.name)
            elif split_of(entry.name) and any(e.name.endswith(".tar") for e in _entries(entry.path)):
                found.tar_folders.append(entry.name)
        elif entry.name.endswith(".tar"):
            found.tars.append(Path(entry.path))
        elif _is_image(entry.name):
            found.images.append(entry.name)
    return found


def list_classes(root: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The images of one split's folder, `root/<class>/**/*.jpg`, or those directly in it where no class folder has any.

    Symbolic links are followed; a folder that is met again inside its own class, or that holds its own class, is named
    and left out. Classes are torchvision's: sorted folders, hidden ones left out, empty ones kept.

    Returns:
        Class names, image paths relative to `root` (sorted within each class) and their labels.

    Raises:
        DataError: no images.
    """
    folders = sorted(entry.name for entry in _entries(root) if _is_folder(entry) and not entry.name.startswith("."))
    loops: dict[str, str] = {}
    base = os.path.join(root, "")
    per_class = [sorted(path[len(base) :] for path in _walk(base + name, loops)) for name in folders]
    if loops:
        named = name_some(f"{link[len(base) :]} -> {target}" for link, target in loops.items())
        log.warning("%s: left out folders that lie in themselves or were there before: %s", root, named)
    if any(per_class):
        empty = [name for name, paths in zip(folders, per_class) if not paths]
        if empty:  # they keep their label, so that two splits of one data set agree
            log.warning("%s: classes without images: %s", root, name_some(empty))
        paths = [path for paths in per_class for path in paths]
        return tuple(folders), paths, [label for label, paths in enumerate(per_class) for _ in paths]
    paths = sorted(entry.name for entry in _entries(root) if not _is_folder(entry) and _is_image(entry.name))
    if not paths:
        state = "has no images" if any(root.iterdir()) else "is empty"
        raise DataError(f"got {root}, which {state}; {_WANT}")
    return (root.resolve().name,), paths, [0] * len(paths)


def _walk(folder: str | Path, loops: dict[str, str]) -> Iterator[str]:
    """Paths of the images below a folder; fills `loops` with links to folders that are not entered again."""
    above = {_identity(p) for path in (os.path.abspath(folder), os.path.realpath(folder)) for p in Path(path).parents}
    seen, waiting = {_identity(folder)}, [str(folder)]
    while waiting:
        here = waiting.pop()
        with _entries(here) as entries:
            for entry in entries:
                if _is_folder(entry):
                    identity = _identity(entry.path)
                    if identity in seen or identity in above:
                        loops[entry.path] = os.path.realpath(entry.path)
                    else:
                        seen.add(identity)
                        waiting.append(entry.path)
                elif _is_image(entry.name):
                    yield entry.path


def _entries(folder: str | Path):
    """`os.scandir`.

    Raises:
        DataError: the folder can't be read.
    """
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"got {folder}, which can't be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it will say so
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("._")  # macOS's copies of attributes
