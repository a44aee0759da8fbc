"""What a recipe says of a target: the mappings below `targets:`, read and checked without waiting for torch.

docs/targets.md has the table of kinds, with their formulas and sources.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from tinymim_fast.errors import InputError

ALL_RELATIONS = tuple("".join(pair) for pair in itertools.product("qkv", repeat=2))
FEATURE_PLACES = ("block_output", "mlp", "attention", "q", "k", "v", "qkv", "norm1", "final_norm")
LOCAL_PLACES = ("block_output", "norm1", "final_norm")
# Names that a record of metrics has already.
RESERVED = (
    "loss",
    "step",
    "epoch",
    "lr",
    "images_per_s",
    "data_wait",
    "time",
    "num_skipped",
    "skipped_steps",
    "spikes",
    "head_kl",
)
MAX_BLOCKS = 1000


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What every kind of target has.

    Args:
        name: in metrics, and of its weights in checkpoints; a recipe's default is the kind. None for a student's only
            target, whose parts are reported by their own names.
        weight: factor in the loss.
    """

    KIND: ClassVar[str]

    name: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class BlockSettings(TargetSettings):
    """What targets inside the models have: pairs of blocks, over which the loss is averaged.

    Args:
        teacher_block: 1-based, or several; default the run's `target_block`.
        student_block: 1-based, or as many; default the last. One is compared with each of several.
    """

    teacher_block: int | tuple[int, ...] | None = None
    student_block: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = {len(blocks) for blocks in (self.teacher_block, self.student_block) if isinstance(blocks, tuple)}
        if len(numbers - {1}) > 1:
            raise InputError(
                f"got {len(self.student_block)} blocks, want as many as of the teacher, {len(self.teacher_block)}",
                argument="student_block",
            )


@dataclass(frozen=True, kw_only=True)
class Relations(BlockSettings):
    """Token relations.

    Args:
        relations: pairs of the letters q, k and v, or "all" nine.
        weights: one a relation; default 1 each, and for "all" a ninth.
        heads: must divide both widths; default the run's `relation_heads`.
        softmax: compare distributions; else the scaled products.
    """

    KIND: ClassVar[str] = "relations"

    relations: tuple[str, ...] | str = ("qk", "vv")
    weights: tuple[float, ...] | None = None
    heads: int | None = None
    softmax: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and len(self.weights) != len(self.names):
            raise InputError(
                f"got {len(self.weights)}, want {len(self.names)}, one for each of {', '.join(self.names)}",
                argument="weights",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The relations, "all" spelled out."""
        return ALL_RELATIONS if self.relations == "all" else tuple(self.relations)

    @property
    def weight_of(self) -> dict[str, float]:
        """Each relation's weight."""
        default = 1 / len(ALL_RELATIONS) if self.relations == "all" else 1.0
        return dict(zip(self.names, self.weights or [default] * len(self.names), strict=True))


@dataclass(frozen=True, kw_only=True)
class Features(BlockSettings):
    """Tokens' features, by smooth L1 against the layer-normed target behind one linear layer.

    Args:
        place: one of `FEATURE_PLACES`.
        after_residual: of "mlp" and "attention": the residual stream after the addition, not what is added.
        beta: where smooth L1 changes from square to straight.
    """

    KIND: ClassVar[str] = "features"

    place: str = "block_output"
    after_residual: bool = False
    beta: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after_residual and self.place not in ("mlp", "attention"):
            raise InputError(f"got true with {self.place}, want it with mlp or attention", argument="after_residual")


@dataclass(frozen=True, kw_only=True)
class Local(BlockSettings):
    """Relations of the patches' normalised features, one head.

    Args:
        place: one of `LOCAL_PLACES`.
        temperature: the cosines are divided by it.
        projection: a linear layer on the student's side, to the teacher's width.
    """

    KIND: ClassVar[str] = "local"

    place: str = "final_norm"
    temperature: float = 0.07
    projection: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place not in LOCAL_PLACES:
            raise InputError(f"got {self.place}, want one of {', '.join(LOCAL_PLACES)}", argument="place")


@dataclass(frozen=True, kw_only=True)
class ClassToken(TargetSettings):
    """The class token behind the final norm, as a feature.

    Args:
        beta: as of `Features`.
    """

    KIND: ClassVar[str] = "class_token"

    beta: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Logits(TargetSettings):
    """The teacher's logits, by a linear layer on the student's class token.

    Args:
        temperature: both sides' logits are divided by it; the loss is multiplied by its square.
    """

    KIND: ClassVar[str] = "logits"

    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Pixels(TargetSettings):
    """Masked patches' pixels, painted by a masked autoencoder's decoder.

    Args:
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        norm_pix_loss: normalise each patch's pixels before comparing.
    """

    KIND: ClassVar[str] = "pixels"

    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_embed_dim % (4 * self.decoder_num_heads):
            raise InputError(
                f"got {self.decoder_embed_dim}, want a multiple of 4 x decoder_num_heads "
                f"({4 * self.decoder_num_heads})",
                argument="decoder_embed_dim",
            )


KINDS = {kind.KIND: kind for kind in (Relations, Features, Local, ClassToken, Logits, Pixels)}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _blocks(value: Any) -> bool:
    several = isinstance(value, tuple) and 0 < len(value) == len(set(value)) <= MAX_BLOCKS
    return value is None or _whole(value) or (several and all(map(_whole, value)))


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", value) and value not in RESERVED


def _relations(value: Any) -> bool:
    several = isinstance(value, tuple) and 0 < len(value) == len(set(value)) and set(value) <= set(ALL_RELATIONS)
    return value == "all" or several


_flag = (lambda value: isinstance(value, bool), "true or false")
_positive = (lambda value: _number(value) and value > 0, "a number above 0")
_whole_number = (_whole, "a whole number above 0")
_block = (_blocks, "a block's number, from 1, or a list of different ones")
# By key: whether a value can be one, and what to say where it can't.
CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": (
        lambda value: value is None or _name(value),
        f"a letter, then letters, digits, _ and -, and none of {', '.join(RESERVED)}",
    ),
    "weight": (lambda value: _number(value) and value >= 0, "0 or more"),
    "teacher_block": _block,
    "student_block": _block,
    "relations": (_relations, f"all, or different ones of {', '.join(ALL_RELATIONS)}, as a list"),
    "weights": (
        lambda value: value is None or (isinstance(value, tuple) and all(_number(v) and v >= 0 for v in value)),
        "a list of numbers, 0 or more",
    ),
    "heads": (lambda value: value is None or _whole(value), "a whole number above 0"),
    "softmax": _flag,
    "place": (lambda value: value in FEATURE_PLACES, f"one of {', '.join(FEATURE_PLACES)}"),
    "after_residual": _flag,
    "beta": _positive,
    "temperature": _positive,
    "projection": _flag,
    "decoder_embed_dim": _whole_number,
    "decoder_depth": _whole_number,
    "decoder_num_heads": _whole_number,
    "norm_pix_loss": _flag,
}


def check_fields(settings: Any, checks: Mapping[str, tuple[Callable[[Any], Any], str]] = CHECKS) -> None:
    """Raise for the first field of a dataclass whose value can't be.

    Raises:
        InputError: its argument is the field.
    """
    for f in fields(settings):
        possible, want = checks.get(f.name, (lambda value: True, ""))
        value = getattr(settings, f.name)
        if not possible(value):
            raise InputError(f"got {_shown(value)}, want {want}", argument=f.name)


Settings = TypeVar("Settings")


def from_mapping(kind: type[Settings], mapping: Mapping[str, Any], where: str) -> Settings:
    """A dataclass from a recipe's mapping, lists as tuples.

    Args:
        kind: the dataclass.
        mapping: its fields by name.
        where: the mapping's place in the recipe, for messages: "targets[0]".

    Raises:
        InputError: a key that there is not, or a value that can't be; its argument is the key with its place.
    """
    names = [f.name for f in fields(kind)]
    for key in mapping:
        if key not in names:
            likely = get_close_matches(str(key).replace("-", "_"), names, n=1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            raise InputError(f"there is no such key, want any of {', '.join(names)}{hint}", argument=f"{where}.{key}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()})
    except InputError as error:
        error.argument = f"{where}.{error.argument}"
        raise
    except TypeError as error:
        raise InputError(f"{error}", argument=where) from error


def read_targets(targets: Any, where: str) -> tuple[TargetSettings, ...]:
    """The targets of a student, each with its name.

    Args:
        targets: a recipe's list of mappings, each with a "kind".
        where: "targets", or "students[1].targets".

    Raises:
        InputError: not such a list, or two of one name; its argument is the key with its place.
    """
    if not isinstance(targets, (list, tuple)) or not targets:
        raise InputError(f"got {_shown(targets)}, want a list of mappings, each with its kind", argument=where)
    found: dict[str, TargetSettings] = {}
    for number, mapping in enumerate(targets):
        at = f"{where}[{number}]"
        if not isinstance(mapping, Mapping):
            raise InputError(f"got {_shown(mapping)}, want a mapping with its kind", argument=at)
        kind = mapping.get("kind")
        if kind not in KINDS:
            raise InputError(f"got {_shown(kind)}, want one of {', '.join(KINDS)}", argument=f"{at}.kind")
        told = {key: value for key, value in mapping.items() if key != "kind"}
        settings = from_mapping(KINDS[kind], {"name": kind, **told}, at)
        if settings.name in found:
            raise InputError(
                f"got {settings.name}, which another target is called too; give each a name", argument=f"{at}.name"
            )
        found[settings.name] = settings
    return tuple(found.values())


def _shown(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:80] + "..."
