"""What a weights file of this package says of itself, and what of it is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import check_kwargs, check_name, shown
from tinymim_fast.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class ModelInfo:
    """What a weights file holds.

    Args:
        architecture: timm name.
        model_kwargs: for `create_vit`, `img_size` included.
        kind: "tinymim" (distilled), "mae", "fine-tuned", "timm", or "foreign": a file that says nothing of itself.
        head_layout: width and heads of each block; for distilled students also `relation_heads`.
        recipe: the run's resolved configuration.
        step: optimizer steps taken.
        epoch: epochs, as a fraction.
        preprocessing: fields of `Preprocessing`, where the recipe does not say them.
        students: of several students of one run, each one's architecture, model_kwargs and head_layout by its name;
            its weights lie behind "student.NAME.". Above stand the first one's.
        teacher_preprocessing: of a distilled student, how its teacher's images were made; None: as the recipe says.
        class_names: of a classifier, in the order of its outputs; None where nobody says them.
    """

    architecture: str
    model_kwargs: dict[str, Any]
    kind: str
    head_layout: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    epoch: float = 0.0
    preprocessing: dict[str, Any] | None = None
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher_preprocessing: dict[str, Any] | None = None
    class_names: list[str] | None = None

    @property
    def expects(self) -> Preprocessing | None:
        """How the images that the model was trained on were made; None where nothing says it."""
        return Preprocessing.from_config(self.preprocessing or self.recipe, self.architecture)

    def of_student(self, name: str | None, path: object) -> ModelInfo:
        """What the file holds of one student.

        Args:
            name: with or without "student." before it.
            path: of the file, for the message.

        Raises:
            InputError: there is none of this name, or none was given; argument "key".
        """
        known = self.students.get((name or "").removeprefix("student."))
        if known is None:
            got = f"got {shown(name)}, but " if name else ""
            raise InputError(
                f"{got}{path} holds the students {', '.join(map(shown, self.students))}; say which", argument="key"
            )
        return replace(self, students={}, **known)

    @property
    def teacher_expects(self) -> Preprocessing | None:
        """How a distilled student's teacher got its images; None where nothing says it."""
        return Preprocessing.from_config(self.teacher_preprocessing or self.recipe, self.architecture)

    @classmethod
    def from_json(cls, text: str, path: object) -> ModelInfo:
        """What `save_weights` wrote into a file's metadata, or anybody else: everything in it is checked.

        Raises:
            InputError: not such a description, or a name, argument or number that can't be; argument "source".
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: its description is no JSON", argument="source") from error
        return cls.from_dict(found, path)

    @classmethod
    def from_dict(cls, found: Any, path: object) -> ModelInfo:
        """`from_json` of what JSON holds.

        Raises:
            InputError: see `from_json`.
        """
        known = {name: kinds for name, kinds in INFO_TYPES.items() if isinstance(found, dict) and name in found}
        for name, kinds in known.items():
            if not isinstance(found[name], kinds) or isinstance(found[name], bool):
                raise InputError(f"{path}: its description has {name} {shown(found[name])}", argument="source")
        lacking = [name for name in ("architecture", "model_kwargs", "kind", "head_layout") if name not in known]
        if lacking:
            raise InputError(f"{path}: its description lacks {', '.join(lacking)}", argument="source")
        info = cls(**{name: found[name] for name in known})
        of_file(path, "its architecture", check_name, info.architecture)
        of_file(path, "its model_kwargs", check_kwargs, info.model_kwargs)
        layout = info.head_layout
        numbers = [layout.get(name, 1) for name in ("embed_dim", "relation_heads", "teacher_block")]
        heads = layout.get("num_heads", [])
        if not isinstance(heads, list) or any(type(n) is not int or n < 1 for n in [*numbers, *heads]):
            raise InputError(f"{path}: its description has a head_layout that can't be", argument="source")
        names = info.class_names
        if names is not None and (
            len(names) != info.model_kwargs.get("num_classes") or any(type(name) is not str for name in names)
        ):
            raise InputError(f"{path}: its description has class_names that can't be", argument="source")
        if info.recipe.get("student_pos_embed", "sincos") not in ("sincos", "learn"):
            raise InputError(f"{path}: its recipe has a student_pos_embed that can't be", argument="source")
        for name, student in info.students.items():
            if not isinstance(student, dict) or student.keys() != {"architecture", "model_kwargs", "head_layout"}:
                raise InputError(
                    f"{path}: its description has a student {shown(name)} that can't be", argument="source"
                )
            cls.from_dict({**found, "students": {}, **student}, path)
        for config in (info.preprocessing or info.recipe, info.teacher_preprocessing):
            Preprocessing.from_config(config, path)
        return info


INFO_TYPES: dict[str, Any] = {
    "architecture": str,
    "model_kwargs": dict,
    "kind": str,
    "head_layout": dict,
    "recipe": dict,
    "step": int,
    "epoch": (int, float),
    "preprocessing": (dict, type(None)),
    "students": dict,
    "teacher_preprocessing": (dict, type(None)),
    "class_names": (list, type(None)),
}


def of_file(path: object, what: str, check: Callable[[Any], Any], value: Any) -> Any:
    """`check(value)`; an `InputError` of it says that `what` of the file is at fault, argument "source"."""
    try:
        return check(value)
    except InputError as error:
        error.argument = None
        raise InputError(f"{path}: {what}: {error}", argument="source") from error
