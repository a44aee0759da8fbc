"""ImageNet's other test sets, in the folders that their archives unpack to: V2, Sketch, A, R, and ReaL's labels.

ImageNet-V2 (arXiv 1902.10811), -Sketch (1905.13549) and -A (1907.07174), -R (2006.16241), whose 200 classes compete
alone; ReaL (2006.07159), new labels for the validation images, several or none an image.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.errors import name_some
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.classes import Head, imagenet_synsets, relabelled
from tinymim_fast.evaluation.ranks import Share
from tinymim_fast.evaluation.top_accuracies import logits_of

# Metric: what its archive unpacks to, and the classes that it has.
FOLDERS = {
    "v2": ("imagenetv2-matched-frequency-format-val", "imagenet"),
    "sketch": ("sketch", "imagenet"),
    "a": ("imagenet-a", "imagenet_a"),
    "r": ("imagenet-r", "imagenet_r"),
}
NUM_VALIDATION = 50_000
VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})(\.\w+)?")


@dataclass(frozen=True)
class TestSet:
    """One of these sets, ready to be evaluated.

    Args:
        index: its images; labels are positions in `outputs`.
        outputs: of the classifier's outputs, those that compete.
    """

    __test__ = False  # not a class of tests

    index: ImageIndex
    outputs: Sequence[int]


def find_folder(data_path: str, name: str) -> Path:
    """The folder `name` in `data_path`, or `data_path` itself where there is none: where a set lies."""
    inside = Path(data_path) / name
    return inside if inside.is_dir() else Path(data_path)


def check_head(metric: str, head: Head) -> tuple[str, ...]:
    """Names of the head's outputs, if they are ImageNet's classes.

    Raises:
        InputError: they are not; argument "metric".
    """
    if head.synsets is None:
        raise InputError(
            f"got {metric}, which wants a classifier of ImageNet's 1000 classes; this one has {head.num_classes} "
            "outputs for other ones",
            argument="metric",
        )
    return head.synsets


def find_test_set(metric: str, data_path: str, head: Head, *, workers: int) -> TestSet:
    """The images of one set, with the outputs that compete for them.

    Args:
        metric: "v2", "sketch", "a" or "r".
        data_path: the set's folder, as its archive has it (of V2 any of the three), or one that holds it under its
            archive's name.
        head: of the classifier.
        workers: processes for a scan.

    Raises:
        InputError: no such folder, other classes in it (argument "data_path"), or a head of other classes (argument
            "metric").
    """
    synsets = check_head(metric, head)
    name, subset = FOLDERS[metric]
    folder, wanted = find_folder(data_path, name), imagenet_synsets(subset)
    index = find_images(folder, split="train", layout="classes", workers=workers)
    names = list(index.class_names)
    if metric == "v2" and set(names) == {str(i) for i in range(len(wanted))}:
        names = [wanted[int(number)] for number in names]  # folders are called by output, not sorted as outputs are
    if set(names) != set(wanted):
        differ = sorted(set(names) ^ set(wanted))
        raise InputError(
            f"{folder}: not {name}: {len(names)} classes, want {len(wanted)}; these are there or lacking: "
            f"{name_some(differ)}",
            argument="data_path",
        )
    return TestSet(relabelled(index, wanted, names), [synsets.index(synset) for synset in wanted])


def read_real_labels(path: str | None = None) -> list[list[int]]:
    """ReaL's labels of ImageNet's 50,000 validation images, in the order of their file names: outputs, none or several.

    Args:
        path: `real.json`; by default the copy that timm ships.

    Raises:
        InputError: another file; argument "real_labels".
    """
    try:
        text = Path(path).read_text() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        labels = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}", argument="real_labels") from error
    if not isinstance(labels, list) or len(labels) != NUM_VALIDATION or any(type(x) is not list for x in labels):
        raise InputError(f"{path}: want a list of {NUM_VALIDATION} lists, ReaL's real.json", argument="real_labels")
    return labels


def real_labels_of(index: ImageIndex, labels: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """ReaL's labels of each image of an index, by the number in its file's name.

    Raises:
        InputError: a file that isn't called as ImageNet's validation images are; argument "data_path".
    """
    found = [VALIDATION_FILE.fullmatch(PurePosixPath(path).name) for path in index.paths]
    strange = [path for path, match in zip(index.paths, found) if not (match and 0 < int(match[1]) <= len(labels))]
    if strange:
        raise InputError(
            f"{index.root}: ReaL's labels belong to files called ILSVRC2012_val_00000001.JPEG and so on; here are "
            f"{name_some(strange, 3)}",
            argument="data_path",
        )
    return [labels[int(match[1]) - 1] for match in found]


def real_accuracy(
    model: nn.Module, index: ImageIndex, view: EvalView, share: Share, labels: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Share of the images with labels whose best output is one of these, over all processes.

    Args:
        model: see `top_accuracies`.
        index: the validation images.
        view: what is made of an image.
        share: this process's part.
        labels: of each image of the index, outputs; images without any don't count.

    Returns:
        `num_images`, those with labels, and `top1_correct`, counts; `top1`, per cent.
    """

    def count() -> torch.Tensor:
        counts = torch.zeros(2, dtype=torch.int64)
        for logits, _, sample_ids in logits_of(model, index, view, share):
            for best, sample in zip(logits.argmax(1).tolist(), sample_ids.tolist()):
                counts += torch.tensor([bool(labels[sample]), best in labels[sample]])
        return counts

    num_images, correct = share.total(share.on_all(count)).tolist()
    return {"num_images": num_images, "top1_correct": correct, "top1": 100 * correct / max(num_images, 1)}
