"""ImageNet-C: the error on corrupted images, and its mean against AlexNet's (Hendrycks and Dietterich, ICLR 2019).

    CE_c = sum_s E_(s,c) / sum_s E^AlexNet_(s,c),   mCE = mean over the 15 corruptions of CE_c

E is the top-1 error at severity s, 1 to 5. Images are evaluated as they are stored, cropped at the centre, not resized:
the set's are 224 pixels wide already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.errors import name_some
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.classes import Head, imagenet_synsets, match_folder
from tinymim_fast.evaluation.imagenet_sets import find_folder
from tinymim_fast.evaluation.ranks import Share
from tinymim_fast.evaluation.top_accuracies import top_accuracies

SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 error of AlexNet, mean over the five severities: arXiv 1903.12261, by github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
GROUPS = ("noise", "blur", "weather", "digital")  # names of the archives, which may have a folder each
FOLDER = "imagenet-c"


def find_corrupted(data_path: str) -> dict[str, dict[int, Path]]:
    """Folder of each corruption at each severity, with class folders in it.

    Args:
        data_path: DIR with DIR/<corruption>/<severity>/<class>/ or DIR/<group>/<corruption>/<severity>/<class>/, or a
            folder that holds it as imagenet-c.

    Raises:
        InputError: one of the 75 is missing; argument "data_path".
    """
    root = find_folder(data_path, FOLDER)
    found = {
        corruption: {severity: _find(root, corruption, severity) for severity in SEVERITIES}
        for corruption in ALEXNET_ERRORS
    }
    missing = [f"{c}/{s}" for c, folders in found.items() for s, folder in folders.items() if folder is None]
    if missing:
        raise InputError(
            f"{root}: ImageNet-C has {len(ALEXNET_ERRORS)} corruptions at {len(SEVERITIES)} severities; these are "
            f"missing: {name_some(missing)}. Unpack noise, blur, weather and digital, or make them of other images",
            argument="data_path",
        )
    return found


def _find(root: Path, corruption: str, severity: int) -> Path | None:
    places = (root / group / corruption / str(severity) for group in (".", *GROUPS))
    return next((folder for folder in places if folder.is_dir() and any(e.is_dir() for e in os.scandir(folder))), None)


def check_corrupted(folders: dict[str, dict[int, Path]], head: Head, *, workers: int) -> bool:
    """Whether the classes are ImageNet's, so that AlexNet's errors compare; refuses sets of other classes than the
    head's, and corruptions that have other classes than others.

    Args:
        folders: see `find_corrupted`.
        head: of the classifier.
        workers: processes for a scan of the first folder.

    Raises:
        InputError: argument "data_path".
    """
    (first, classes), *others = ((folder, _classes(folder)) for folder in _all(folders))
    for folder, names in others:
        if names != classes:
            differ = name_some(sorted(classes ^ names))
            raise InputError(f"{folder}: has other classes than {first}: {differ}", argument="data_path")
    _find_images(first, head, workers)
    return head.synsets is not None and len(classes) == len(imagenet_synsets())


def _find_images(folder: Path, head: Head, workers: int) -> ImageIndex:
    return match_folder(find_images(folder, layout="classes", workers=workers), head)


def _all(folders: dict[str, dict[int, Path]]) -> Iterator[Path]:
    for by_severity in folders.values():
        yield from by_severity.values()


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}


def corruption_errors(
    model: nn.Module,
    folders: dict[str, dict[int, Path]],
    head: Head,
    view: EvalView,
    share: Share,
    *,
    of_imagenet: bool,
) -> dict[str, Any]:
    """Top-1 errors on each corruption at each severity, over all processes, and what they come to.

    Args:
        model: see `top_accuracies`.
        folders: see `find_corrupted`.
        head: of the model.
        view: of the other evaluations; only its crop, mean and standard deviation are taken.
        share: this process's part.
        of_imagenet: what `check_corrupted` says.

    Returns:
        `counts` and `errors` by corruption, a list over severities: images, right ones, and per cent wrong;
        `mean_error`, per cent; for ImageNet's classes also `corruption_errors` by corruption and `mce`, per cent of
        AlexNet's.

    Raises:
        InputError: an image that can't be decoded, or a class that the head does not have.
    """
    view = replace(view, resize_size=view.img_size)
    counts: dict[str, list[list[int]]] = {}
    for corruption, by_severity in folders.items():
        counts[corruption] = []
        for folder in by_severity.values():
            index = share.on_all(lambda folder=folder: _find_images(folder, head, share.workers))
            found = top_accuracies(model, index, view, share)
            counts[corruption].append([found["num_images"], found["top1_correct"]])
    return summarise(counts, of_imagenet=of_imagenet)


def summarise(counts: dict[str, list[list[int]]], *, of_imagenet: bool) -> dict[str, Any]:
    """`corruption_errors`' result from its `counts`; against AlexNet's errors only for ImageNet's classes."""
    errors = {c: [100 * (1 - right / images) for images, right in of_c] for c, of_c in counts.items()}
    means = {c: sum(of_c) / len(of_c) for c, of_c in errors.items()}
    result = {"counts": counts, "errors": errors, "mean_error": sum(means.values()) / len(means)}
    if of_imagenet:
        relative = {c: mean / ALEXNET_ERRORS[c] for c, mean in means.items()}
        result |= {"corruption_errors": relative, "mce": sum(relative.values()) / len(relative)}
    return result
