"""What can be asked of a classifier: each metric is checked whole before the first image is decoded, then run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.classes import Head, imagenet_synsets, match_folder
from tinymim_fast.evaluation.corruptions import check_corrupted, corruption_errors, find_corrupted
from tinymim_fast.evaluation.imagenet_sets import (
    FOLDERS,
    check_head,
    find_test_set,
    read_real_labels,
    real_accuracy,
    real_labels_of,
)
from tinymim_fast.evaluation.make_corruptions import check_maker, make_corruptions
from tinymim_fast.evaluation.ranks import Share
from tinymim_fast.evaluation.top_accuracies import top_accuracies

OF_CLASSIFIER = ("top1", "real", *FOLDERS, "c")
OF_FEATURES = ("knn", "linear")

Run = Callable[[EvalView], dict[str, Any]]  # what is made of an image -> results


@dataclass(frozen=True)
class Sources:
    """Where the images and labels are.

    Args:
        data_path: folder with val/<class>/ for top1 and real, and the test sets, see `find_test_set`.
        real_labels: see `read_real_labels`.
        make_corruptions: folder to make of the validation images for c, instead of ImageNet-C's.
    """

    data_path: str
    real_labels: str | None = None
    make_corruptions: str | None = None


def prepare(metrics: Sequence[str], model: nn.Module, head: Head, share: Share, sources: Sources) -> dict[str, Run]:
    """What runs each metric of a classifier; everything that can be wrong with its folder is found here.

    Args:
        metrics: any of `OF_CLASSIFIER`.
        model: see `top_accuracies`.
        head: its outputs.
        share: this process's part; `prepare` itself talks to no other.
        sources: of the images and labels.

    Raises:
        InputError: argument "data_path", "metric", "real_labels" or "make_corruptions".
    """
    if sources.make_corruptions and ("c" not in metrics or share.world_size > 1):
        raise InputError(
            "makes images for the metric c, in one process; ask for c, and take several for what it made only",
            argument="make_corruptions",
        )
    try:
        return {metric: _prepare(metric, model, head, share, sources) for metric in metrics}
    except InputError as error:  # of a folder, by those who don't know that it was a flag
        error.argument = error.argument or "data_path"
        raise


def _prepare(metric: str, model: nn.Module, head: Head, share: Share, sources: Sources) -> Run:
    if metric == "c" and not sources.make_corruptions:
        folders = find_corrupted(sources.data_path)
        of_imagenet = check_corrupted(folders, head, workers=share.workers)
        return lambda view: corruption_errors(model, folders, head, view, share, of_imagenet=of_imagenet)
    if metric in FOLDERS:
        found = find_test_set(metric, sources.data_path, head, workers=share.workers)
        return lambda view: top_accuracies(model, found.index, view, share, outputs=found.outputs)
    index = find_images(sources.data_path, split="val", workers=share.workers)
    if metric == "real":
        synsets = check_head(metric, head)
        output = [synsets.index(synset) for synset in imagenet_synsets()]
        labels = real_labels_of(index, read_real_labels(sources.real_labels))
        of_head = [[output[label] for label in of_image] for of_image in labels]
        return lambda view: real_accuracy(model, index, view, share, of_head)
    matched = match_folder(index, head)
    if metric == "c":
        check_maker()
        return lambda view: _on_made(model, index, head, view, share, str(sources.make_corruptions))
    return lambda view: top_accuracies(model, matched, view, share)


def _on_made(model: nn.Module, index: ImageIndex, head: Head, view: EvalView, share: Share, out: str) -> dict[str, Any]:
    make_corruptions(index, Path(out), view, workers=share.workers, progress=tqdm_of_folders)
    folders = find_corrupted(out)
    of_imagenet = check_corrupted(folders, head, workers=share.workers)
    return corruption_errors(model, folders, head, view, share, of_imagenet=of_imagenet)


def tqdm_of_folders(parts: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar over the folders of corrupted images."""
    return tqdm(parts, total=total, desc="corrupting", unit="folder")


def read_class_map(path: str) -> tuple[str, ...]:
    """Names of a head's classes from a file, one a line in the order of the outputs, as timm's class maps are.

    Raises:
        InputError: it can't be read, or a name comes twice; argument "class_map".
    """
    try:
        names = tuple(line for line in map(str.strip, Path(path).read_text("utf-8").splitlines()) if line)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}", argument="class_map") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise InputError(f"{path}: want a name a line, none twice; got {twice[:3] or 'none'}", argument="class_map")
    return names
