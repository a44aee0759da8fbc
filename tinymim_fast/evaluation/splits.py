"""Two splits of one data set, with labels that mean the same class in both."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.errors import name_some
from tinymim_fast.errors import InputError

logger = logging.getLogger("tinymim_fast")


def find_splits(data_path: str, *, workers: int) -> tuple[ImageIndex, ImageIndex]:
    """Training and validation images; a validation label is its class's number, by name, among the training classes.

    Args:
        data_path: folder with train/<class>/ and val/<class>/, or labelled shards train-*.tar and val-*.tar, or an
            index of such.
        workers: processes for a scan.

    Raises:
        InputError: no such folder, no labels, no validation split of its own, or a validation class that has no
            training images; argument "data_path".
    """
    try:
        train, val = (find_images(data_path, split=split, workers=workers) for split in ("train", "val"))
    except InputError as error:
        error.argument = error.argument or "data_path"
        raise
    return train, match_splits(data_path, train, val)


def match_splits(data_path: str, train: ImageIndex, val: ImageIndex) -> ImageIndex:
    """`val` with the labels that its classes, by name, have in `train`.

    Args:
        data_path: of both, for messages.
        train: the training images.
        val: the validation images.

    Raises:
        InputError: see `find_splits`.
    """
    shared = set(_files(train)) & set(_files(val))
    if shared:
        raise _refused(
            data_path,
            f"{len(shared)} of {len(val)} validation images are training images; want train/<class>/ and val/<class>/ "
            "beside each other, or shards train-*.tar and val-*.tar",
        )
    names_t, names_v = _names(train), _names(val)
    if len(set(names_t)) < 2:
        only = f"one class, {names_t[0]}" if names_t else "no class"
        raise _refused(
            data_path, f"the training images have {only}; want two or more, in class folders or as shards' labels"
        )
    unknown = sorted(set(names_v) - set(names_t))
    if unknown:
        raise _refused(
            data_path,
            f"the validation images have {len(unknown)} classes without training images, {name_some(unknown)}; the "
            f"training images have {name_some(sorted(names_t))}. Want the same class folders, or labels, in both",
        )
    absent = sorted(set(names_t) - set(names_v))
    if absent:
        logger.warning("%s: no validation images of %d classes: %s", data_path, len(absent), name_some(absent))
    number = {name: label for label, name in enumerate(train.class_names)}
    labels = np.array([number[val.class_names[label]] for label in val.labels], dtype=np.int64)
    return replace(val, labels=labels, class_names=train.class_names)


def _names(index: ImageIndex) -> list[str]:
    """Names of the classes that have images."""
    return [index.class_names[label] for label in np.unique(index.labels)]


def _files(index: ImageIndex) -> Iterable[tuple[str, ...]]:
    """What tells an image from another: its file, or its shard and its place there."""
    root = os.path.realpath(index.root)
    if not index.shards:
        return ((os.path.join(root, path),) for path in index.paths)
    return ((root, index.shards[shard], str(offset)) for shard, offset in index.spans.tolist())


def _refused(data_path: str, why: str) -> InputError:
    return InputError(f"{data_path}: {why}", argument="data_path")
