"""Which output of a classifier is which class of a folder: by name, never by chance."""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.data import ImageIndex
from tinymim_fast.data.errors import name_some
from tinymim_fast.errors import InputError
from tinymim_fast.models.classifier import load_classifier
from tinymim_fast.models.model_info import ModelInfo

logger = logging.getLogger("tinymim_fast")
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Head:
    """What is known of a classifier's outputs.

    Args:
        num_classes: outputs.
        class_names: name of each output's class; None where nothing says them.
    """

    num_classes: int
    class_names: tuple[str, ...] | None = None

    @property
    def synsets(self) -> tuple[str, ...] | None:
        """Names of the outputs as ImageNet's folders have them; a head of 1,000 without names is taken as ImageNet's.

        None where the outputs are other classes.
        """
        of_imagenet = imagenet_synsets()
        if self.class_names is None:
            return of_imagenet if self.num_classes == IMAGENET_CLASSES else None
        return self.class_names if set(self.class_names) >= set(of_imagenet) else None


@functools.cache
def imagenet_synsets(subset: str = "imagenet") -> tuple[str, ...]:
    """WordNet ids of ImageNet-1k's classes in the order of its heads, or of a subset's ("imagenet_a", "imagenet_r").

    From the lists that timm ships.
    """
    return tuple(pkgutil.get_data("timm.data", f"_info/{subset}_synsets.txt").decode().split())


def load_with_head(
    source: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[VisionTransformer, ModelInfo, Head]:
    """`load_classifier`, and what is known of the outputs.

    Args:
        source: see `load_classifier`, as `model`, `model_kwargs` and `key`.
        class_names: instead of those that the file says.

    Raises:
        InputError: see `load_classifier`; or another number of names than outputs, argument "class_map".
    """
    vit, info = load_classifier(source, model=model, model_kwargs=model_kwargs, key=key)
    if class_names is not None and len(class_names) != vit.num_classes:
        raise InputError(
            f"got {len(class_names)} names for {vit.num_classes} outputs, want one for each", argument="class_map"
        )
    names = info.class_names if class_names is None else class_names
    return vit, info, Head(vit.num_classes, None if names is None else tuple(names))


def match_folder(index: ImageIndex, head: Head, *, argument: str = "data_path") -> ImageIndex:
    """`index` with outputs of the head as labels.

    Names decide where they are known: the checkpoint's, or for 1,000 outputs WordNet ids. Else the folders' sorted
    order is taken, which is how torchvision, timm and this package number classes, and it is said.

    Args:
        index: images in class folders, or with labels of shards.
        head: of the model.
        argument: the one to name in errors.

    Raises:
        InputError: no classes, classes that the head does not have, another number of them, an order that can be read
            in two ways, or the 200 classes of ImageNet-A or -R, where another accuracy is meant.
    """
    names = [index.class_names[label] for label in np.unique(index.labels)]
    if not index.is_labelled:
        raise InputError(f"{index.root}: has images without classes; want DIR/<class>/*.jpg", argument=argument)
    refuse_subset(names, head, index.root)
    known = head.class_names or (head.synsets if set(names) <= set(head.synsets or ()) else None)
    if known is None:
        known = _sorted_order(index, head, argument)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(
            f"{index.root}: has {len(unknown)} classes that the classifier does not have, {name_some(unknown)}; it has "
            f"{name_some(known)}. Want the same names",
            argument=argument,
        )
    absent = len(known) - len(names)
    if absent:
        logger.warning("%s: no images of %d of the classifier's %d classes", index.root, absent, len(known))
    return relabelled(index, known)


def relabelled(index: ImageIndex, outputs: Sequence[str], names: Sequence[str] | None = None) -> ImageIndex:
    """`index` with positions in `outputs` as labels.

    Args:
        index: images, whose classes are all in `outputs`.
        outputs: names of classes.
        names: of the index's classes; by default its own.
    """
    position = {name: number for number, name in enumerate(outputs)}
    names = names or index.class_names
    labels = np.array([position[names[label]] for label in index.labels], dtype=np.int64)
    return replace(index, labels=labels, class_names=tuple(outputs))


def refuse_subset(names: Sequence[str], head: Head, root: object) -> None:
    """Refuse ImageNet-A's and -R's folders where an accuracy among all 1,000 classes is asked for.

    Raises:
        InputError: argument "metric".
    """
    if head.synsets is None:
        return
    for metric, subset in {"a": "imagenet_a", "r": "imagenet_r"}.items():
        if set(names) == set(imagenet_synsets(subset)):
            raise InputError(
                f"{root} holds the 200 classes of {subset}, where the other {head.num_classes - 200} outputs don't "
                f"compete; take the metric {metric}",
                argument="metric",
            )


def _sorted_order(index: ImageIndex, head: Head, argument: str) -> tuple[str, ...]:
    names = index.class_names
    if len(names) != head.num_classes:
        raise InputError(
            f"{index.root}: has {len(names)} classes, {name_some(names)}, and the classifier {head.num_classes} "
            "outputs, whose names the checkpoint does not say; want a folder for each, or their names by a class map",
            argument=argument,
        )
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        raise InputError(
            f"{index.root}: its classes are numbers, which can be read by value or in the order of names (1, 10, 2), "
            "and the checkpoint does not say its classes; give a class map, with a name a line in the order of the "
            "outputs",
            argument=argument,
        )
    logger.warning("%s: the checkpoint does not say its classes; assumed: these, sorted by name", index.root)
    return names
