"""Students with their targets: what the engine trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.profiler import record_function

from tinymim_fast.errors import InputError
from tinymim_fast.models.taps import Taps
from tinymim_fast.random_streams import RandomStreams
from tinymim_fast.targets.class_token import ClassTokenTarget, LogitsTarget
from tinymim_fast.targets.features import FeatureTarget
from tinymim_fast.targets.local import LocalTarget
from tinymim_fast.targets.pixels import PixelTarget
from tinymim_fast.targets.relations import RelationTarget
from tinymim_fast.targets.settings import (
    ClassToken,
    Features,
    Local,
    Logits,
    Pixels,
    Relations,
    TargetSettings,
)
from tinymim_fast.targets.target import Target

Item = TypeVar("Item")


def build_target(
    settings: TargetSettings,
    student: VisionTransformer,
    teacher: VisionTransformer,
    *,
    backend: str,
    tokens: str = "all",
) -> Target:
    """The target that settings mean, its trained weights from torch's random numbers.

    Args:
        settings: blocks and heads filled in.
        student, teacher: their shapes are read.
        backend: of relation losses.
        tokens: which relations and features are of, see `tokens_to_cut`.

    Raises:
        InputError: models that it doesn't fit; the argument is a key of the settings, or "model_kwargs".
    """
    match settings:
        case Relations():
            return RelationTarget(settings, student, teacher, backend, tokens)
        case Features():
            return FeatureTarget(settings, student, teacher, tokens)
        case Local():
            return LocalTarget(settings, student, teacher, backend)
        case ClassToken():
            return ClassTokenTarget(settings, student, teacher)
        case Logits():
            return LogitsTarget(settings, student, teacher)
        case Pixels():
            return PixelTarget(settings, student)
    raise TypeError(f"no target of {type(settings).__name__}")


class Distiller(nn.Module):
    """One student and its targets.

    The loss is the sum of the targets' losses times their weights.

    Args:
        student: built; computed as far as the targets' places.
        targets: its targets.
        num_visible: patches that the student sees; None: all.

    Attributes:
        places_t: places of the teacher whose tensors `forward` is given, in this order: all that its targets ask for,
            or more.

    Raises:
        InputError: a target's name that can't be a module's; argument "name".
    """

    def __init__(
        self,
        student: VisionTransformer,
        targets: Sequence[Target],
        *,
        num_visible: int | None = None,
    ):
        super().__init__()
        self.student = Taps(student, distinct(place for target in targets for place in target.places_s))
        self.targets = nn.ModuleDict()
        for target in targets:
            name = target.name or "relations"
            if hasattr(self.targets, name):
                raise InputError(f"got {name}, which PyTorch uses itself; want another name", argument="name")
            self.targets[name] = target
        self.places_t = distinct(place for target in targets for place in target.places_t)
        self.num_visible = num_visible

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses that `forward` gives: "loss", each target, and its parts behind its name."""
        return ("loss", *(name for target in self.targets.values() for name in _names(target).values()))

    def restore(self, saved: Mapping[str, torch.Tensor], source: object) -> None:
        """Fill what the targets train.

        Args:
            saved: weights by name in `targets`.
            source: where they are from, for the message.

        Raises:
            InputError: names the first that is missing or of another shape; argument "source".
        """
        for name, parameter in self.targets.named_parameters():
            if parameter.requires_grad:
                found = saved.get(name)
                if found is None or found.shape != parameter.shape:
                    has = "none" if found is None else tuple(found.shape)
                    raise InputError(
                        f"{source}: targets.{name} is {has}, want {tuple(parameter.shape)}", argument="source"
                    )
                parameter.data.copy_(found)

    def forward(self, images: torch.Tensor, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses by name, see `parts`, each an fp32 scalar.

        Args:
            images: student view, (B, 3, H, W).
            *given: the teacher's tensors of `places_t`, of the visible tokens alone where `num_visible` is given; then
                also the patches' order, (B, L) int64.
        """
        shuffle = given[-1] if self.num_visible else None
        of_teacher = dict(zip(self.places_t, given))
        with record_function("student"):
            of_student = self.student(images, None if shuffle is None else shuffle[:, : self.num_visible])
        losses, weighted = {}, []
        with record_function("loss"):
            for target in self.targets.values():
                tensors_s = tuple(_behind(of_student[place], target.cut[0]) for place in target.places_s)
                tensors_t = tuple(_behind(of_teacher[place], target.cut[1]) for place in target.places_t)
                if isinstance(target, PixelTarget):
                    found = target(tensors_s, images, shuffle)
                else:
                    found = target(tensors_s, tensors_t)
                weighted.append(found["loss"] if target.weight == 1 else target.weight * found["loss"])
                losses |= {name: found[part] for part, name in _names(target).items()}
        return {"loss": weighted[0] if len(weighted) == 1 else sum(weighted), **losses}


class JointDistiller(nn.Module):
    """Several students of one teacher pass, each with its own losses, which are summed.

    No weight is shared, so each student's gradient is what it would be alone.

    Args:
        students: by name.
        streams: random numbers of each, by the same names.

    Raises:
        InputError: a name that can't be a module's; argument "name".
    """

    def __init__(self, students: Mapping[str, Distiller], streams: RandomStreams):
        super().__init__()
        self.students = nn.ModuleDict()
        for name, student in students.items():
            if hasattr(self.students, name):
                raise InputError(f"got {name}, which PyTorch uses itself; want another name", argument="name")
            self.students[name] = student
        self.streams = streams

    @property
    def parts(self) -> tuple[str, ...]:
        """ "loss", the sum, and each student's parts behind its name."""
        return ("loss", *(f"{name}/{part}" for name, student in self.students.items() for part in student.parts))

    def forward(self, images: torch.Tensor, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses by name, see `parts`; takes what each `Distiller` takes."""
        losses = {}
        for name, student in self.students.items():
            with self.streams.of(name):
                losses |= {f"{name}/{part}": loss for part, loss in student(images, *given).items()}
        return {"loss": sum(losses[f"{name}/loss"] for name in self.students), **losses}


def distinct(items: Iterable[Item]) -> tuple[Item, ...]:
    """Each once, in the order of their first appearance."""
    return tuple(dict.fromkeys(items))


def _behind(tokens: torch.Tensor, cut: int) -> torch.Tensor:
    """(B, N, C) without the first `cut` tokens."""
    return tokens[:, cut:] if cut else tokens


def _names(target: Target) -> dict[str, str]:
    """What is reported of a target's losses: names by part."""
    if target.name is None:
        return {part: part for part in target.parts}
    return {"loss": target.name, **{part: f"{target.name}/{part}" for part in target.parts}}
