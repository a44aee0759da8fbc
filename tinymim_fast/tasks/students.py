"""What a recipe says of a student: one entry of `students:`, or the flags of the only one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinymim_fast.errors import InputError
from tinymim_fast.targets.settings import (
    CHECKS,
    Pixels,
    Relations,
    TargetSettings,
    check_fields,
    from_mapping,
    read_targets,
)

RELATIONS = ("qk", "vv")  # by default
# Keys of an entry whose flag has another name.
FLAGS = {"model": "student_model", "model_kwargs": "student_model_kwargs", "pos_embed": "student_pos_embed"}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """One student. What an entry of `students:` does not say is what the run's flags say.

    Args:
        name: of its losses and weights; None for the only student of the flags.
        model: timm name.
        model_kwargs: for `timm.create_model`; those of the flags only where the model is theirs too.
        pos_embed: "sincos" or "learn".
        drop_path: the same in every block before the last.
        lr_scale: factor on the learning rate.
        target_block: the teacher's block, where a target doesn't say one.
        relation_heads: heads of relations, where a target doesn't say them.
        relations: of the only target, where `targets` says none.
        relation_weights: one a relation.
        targets: mappings, see `targets.settings`.
    """

    name: str | None = None
    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pos_embed: str = "sincos"
    drop_path: float = 0.1
    lr_scale: float = 1.0
    target_block: int | None = None
    relation_heads: int | None = None
    relations: tuple[str, ...] = RELATIONS
    relation_weights: tuple[float, ...] | None = None
    targets: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, STUDENT_CHECKS)
        if self.targets is not None and (self.relations, self.relation_weights) != (RELATIONS, None):
            raise InputError(
                f"got {list(self.relations)} beside targets; say them in a target, "
                "{kind: relations, relations: [...], weights: [...]}",
                argument="relations",
            )


def _probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


STUDENT_CHECKS = {
    "name": CHECKS["name"],
    "model": (lambda value: isinstance(value, str) and value, "a timm name"),
    "model_kwargs": (lambda value: isinstance(value, Mapping), "a mapping"),
    "pos_embed": (lambda value: value in ("sincos", "learn"), "sincos or learn"),
    "drop_path": (_probability, "a probability below 1"),
    "lr_scale": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
    "target_block": (lambda value: value is None or (type(value) is int and value > 0), "1 or more"),
    "relation_heads": CHECKS["heads"],
    "relations": (lambda value: isinstance(value, tuple) and CHECKS["relations"][0](value), CHECKS["relations"][1]),
    "relation_weights": CHECKS["weights"],
}


def read_students(students: Any, defaults: StudentConfig) -> tuple[StudentConfig, ...]:
    """The students of a recipe's list, each with its name; the model's where it says none.

    Args:
        students: mappings.
        defaults: what the run's flags say.

    Raises:
        InputError: not such a list, or two of one name; its argument is the key with its place.
    """
    if not students:
        raise InputError("got none, want a list of mappings, each with its model", argument="students")
    found: dict[str, StudentConfig] = {}
    for number, mapping in enumerate(students):
        where = f"students[{number}]"
        if not isinstance(mapping, Mapping):
            raise InputError(f"got {mapping}, want a mapping with its model", argument=where)
        inherited = {**vars(defaults), "name": mapping.get("model", defaults.model)}
        if "model" in mapping:
            inherited["model_kwargs"] = {}
        if "targets" in mapping:
            inherited |= {"relations": RELATIONS, "relation_weights": None}
        elif "relations" in mapping:
            inherited |= {"targets": None, "relation_weights": None}
        student = from_mapping(StudentConfig, {**inherited, **mapping}, where)
        if student.name is None:
            raise InputError("got none, want a name", argument=f"{where}.name")
        if student.name in found:
            raise InputError(
                f"got {student.name}, which another student is called too; give each a name", argument=f"{where}.name"
            )
        found[student.name] = student
    return tuple(found.values())


def targets_of(student: StudentConfig, where: str, mask_ratio: float) -> tuple[TargetSettings, ...]:
    """What a student is told to reproduce.

    Args:
        student: of it.
        where: its place in the recipe, "students[1]." or nothing.
        mask_ratio: of the run.

    Raises:
        InputError: keys or values that can't be; its argument is the key with its place.
    """
    if student.targets is None:
        return (Relations(relations=student.relations, weights=student.relation_weights),)
    targets = read_targets(student.targets, f"{where}targets")
    for number, target in enumerate(targets):
        if isinstance(target, Pixels) and not mask_ratio:
            raise InputError(
                "got pixels without masked patches; set mask_ratio, 0.75 in MAE",
                argument=f"{where}targets[{number}].kind",
            )
    if all(isinstance(target, Pixels) for target in targets):
        raise InputError(
            "got pixels alone, which need no teacher: tinymim_fast/pretrain.py trains on them",
            argument=f"{where}targets",
        )
    return targets
